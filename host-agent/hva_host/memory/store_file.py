"""A store that is a file on a disk: where it is made, and how a pager finds it.

The file never has a name (O_TMPFILE with O_EXCL, open(2)): nobody can open it by one, no link can be in its place, and
it is gone with the last descriptor, whoever is killed. The host agent makes it and QEMU inherits the one descriptor
that lasts. Beside it the shim leaves a memfd that says which of QEMU's files it is.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path

from hva_host.memory.syscalls import punch_hole
from hva_host.memory.waiting import in_memory
from hvaqemu.errors import HostError
from hvaqemu.pages import PAGE_SIZE
from hvaqemu.units import format_size

#: Names of memfds, given by the shim: of the store itself, or of where it is.
STORE_NAME = "hva-store"
STORE_AT_NAME = "hva-store-at"
#: Device and inode, as the shim writes them.
_IDENTITY = struct.Struct("=QQ")


def make_store_file(folder: Path, limit: int) -> int:
    """A descriptor of a new file for a store.

    :param limit: bytes the store may come to occupy.
    :raise HostError: naming the key: it can not be there, or there is no room for it.
    """
    named = f"store.folder: {folder}"
    if not folder.is_dir():
        raise HostError(f"{named}: there is no such folder", "make it, or choose another one")
    try:
        fd = os.open(folder, os.O_TMPFILE | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        hint = "choose a folder you may write to, on ext4, xfs or btrfs"
        raise HostError(f"{named}: a file without a name can not be made: {error.strerror}", hint) from error
    try:
        _check(fd, named, limit)
    except BaseException:
        os.close(fd)
        raise
    return fd


def store_identity(fd: int) -> tuple[int, int]:
    """Device and inode of the file that is a store, from the memfd that says it; (0, 0) if that says nothing."""
    said = os.pread(fd, _IDENTITY.size, 0)
    device, inode = _IDENTITY.unpack(said) if len(said) == _IDENTITY.size else (0, 0)
    return device, inode


def _check(fd: int, named: str, limit: int) -> None:
    if in_memory(os.fstat(fd).st_dev):
        hint = "choose a folder on a disk, or leave the key out: then the store is in memory"
        raise HostError(f"{named}: is in the host's memory, not on a disk", hint)
    # Of its full length from the beginning: xfs allocates ahead where a file grows, and counts that as occupied.
    try:
        os.ftruncate(fd, -(-limit // PAGE_SIZE) * PAGE_SIZE)
    except OSError as error:
        raise HostError(f"{named}: a file of {format_size(limit)} can not be made: {error.strerror}") from error
    try:
        punch_hole(fd, 0, PAGE_SIZE)
    except OSError as error:
        hint = "choose a folder on ext4, xfs or btrfs"
        raise HostError(f"{named}: room can not be given back there ({error.strerror})", hint) from error
    system = os.fstatvfs(fd)
    room = system.f_bavail * system.f_frsize
    if room < limit:
        raise HostError(
            f"{named}: has room for {format_size(room)}, and the store may take {format_size(limit)}",
            "make room, choose another folder, or lower store.limit",
        )
