"""The disk images a VM is started with: looked at before QEMU is, so that what is wrong is said in one line."""

from __future__ import annotations

import os
import stat
import subprocess
from collections.abc import Sequence
from pathlib import Path

from hvaqemu.config import ExtraDisk
from hvaqemu.errors import ConfigError, HostError
from hvaqemu.qemu import logs
from hvaqemu.qemu.command import RawDisk

SECTOR = 512
_QEMU_IMG_SECONDS = 60.0


def check_raw(path: Path, *, read_only: bool, name: str = "") -> os.stat_result:
    """See that ``path`` can be a raw disk: a file or block device we may open, of whole sectors, not empty.

    Its content is never looked at: a guest may write anything to its disk.

    :param name: what the user calls it, put before the path in errors.
    :raise ConfigError: it can not.
    """
    named = f"{name}: {path}" if name else str(path)
    try:
        # Non-blocking, so that a pipe is refused and not waited for.
        descriptor = os.open(path, (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC | os.O_NONBLOCK)
    except IsADirectoryError as error:
        raise ConfigError(f"{named}: is not a file or block device") from error
    except OSError as error:
        hint = (
            "make it writable, or set read_only: true" if isinstance(error, PermissionError) and not read_only else ""
        )
        raise ConfigError(f"{named}: {error.strerror}", hint) from error
    try:
        status = os.fstat(descriptor)
        if not (stat.S_ISREG(status.st_mode) or stat.S_ISBLK(status.st_mode)):
            raise ConfigError(f"{named}: is not a file or block device")
        size = os.lseek(descriptor, 0, os.SEEK_END)
    finally:
        os.close(descriptor)
    if size == 0 or size % SECTOR:
        raise ConfigError(f"{named}: {size} bytes, but a disk has a multiple of {SECTOR}")
    return status


def check_extra_disks(disks: Sequence[ExtraDisk]) -> tuple[RawDisk, ...]:
    """The extra disks as QEMU will find them.

    :raise ConfigError: one can not be used, or two are the same and one of them is written.
    """
    found: list[RawDisk] = []
    seen: dict[tuple[int, int], int] = {}
    for index, disk in enumerate(disks):
        name = f"extra_disks[{index}]"
        status = check_raw(disk.path, read_only=disk.read_only, name=name)
        block = stat.S_ISBLK(status.st_mode)
        identity = (-1, status.st_rdev) if block else (status.st_dev, status.st_ino)
        other = seen.setdefault(identity, index)
        if other != index and not (disk.read_only and disks[other].read_only):
            raise ConfigError(
                f"{name}: {disk.path}: is the same disk as extra_disks[{other}]", "make both read_only: true"
            )
        if disk.layer and block:
            raise ConfigError(f"{name}: {disk.path}: is a block device, and only a file is a layer", "set layer: false")
        still = disk.read_only and not block and not disk.direct
        layer = still and disk.layer is not False and other == index
        found.append(RawDisk(disk.path.absolute(), disk.read_only, block, disk.direct, layer))
    return tuple(found)


def create_overlay(golden: Path, overlay: Path) -> None:
    """Make ``overlay``, an empty qcow2 file on top of the raw image ``golden``. Blocks for some 20 ms.

    :raise ConfigError: ``golden`` can not be used.
    :raise HostError: qemu-img is not there, or failed; nothing is left behind.
    """
    check_raw(golden.absolute(), read_only=True)
    _create(overlay, ("-F", "raw", "-b", str(golden.absolute())))


def create_next(below: Path, overlay: Path, size: int) -> None:
    """Make ``overlay``, an empty qcow2 file on top of a qcow2 file that a QEMU may have open.

    :param size: bytes of the disk; ``below`` is not opened.
    :raise HostError: as :func:`create_overlay`.
    """
    _create(overlay, ("-u", "-F", "qcow2", "-b", str(below.absolute())), size)


def create_empty(path: Path, size: int) -> None:
    """Make an empty qcow2 file of a disk of ``size`` bytes.

    :raise HostError: as :func:`create_overlay`.
    """
    _create(path, (), size)


def _create(overlay: Path, options: Sequence[str], size: int | None = None) -> None:
    # Absolute: qemu-img takes "name:" at the start of a relative path for a protocol, and a relative backing file is
    # looked for beside the overlay.
    overlay = overlay.absolute()
    if overlay.exists():
        raise HostError(f"{overlay}: is already there")
    command = ["qemu-img", "create", "-q", "-f", "qcow2", *options, str(overlay)]
    command += [] if size is None else [str(size)]
    try:
        done = subprocess.run(
            command,
            check=False,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_QEMU_IMG_SECONDS,
            umask=0o077,
        )
    except FileNotFoundError as error:
        raise HostError("qemu-img: not found", "install the package qemu-utils") from error
    except subprocess.TimeoutExpired as error:
        overlay.unlink(missing_ok=True)
        raise HostError(f"qemu-img: {overlay} was not made within {_QEMU_IMG_SECONDS:.0f} s") from error
    if done.returncode != 0:
        overlay.unlink(missing_ok=True)
        raise HostError(logs.one_line(logs.printable(done.stderr.strip())) or f"qemu-img: status {done.returncode}")
