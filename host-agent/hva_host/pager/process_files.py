"""What a process has open and mapped, as ``/proc`` tells it."""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

from hva_host.memory.syscalls import pidfd_getfd
from hvaqemu.errors import HostError, PeerLost

#: Never a file. Closing a descriptor of the ledger would drop this process's lock on it (fcntl(2), record locks).
_MEMFD = "/memfd:"


@dataclass(frozen=True)
class Mapping:
    """A mapping in ``/proc/PID/maps``; addresses and offset in bytes."""

    start: int
    stop: int
    offset: int
    inode: int
    shared: bool


def descriptors(pid: int) -> dict[int, str]:
    """The link text of each descriptor of a process.

    :raise PeerLost: no such process.
    :raise HostError: it may not be looked into.
    """
    folder = Path(f"/proc/{pid}/fd")
    found = {}
    try:
        for entry in folder.iterdir():
            try:
                found[int(entry.name)] = str(entry.readlink())
            except FileNotFoundError:
                continue
    except (FileNotFoundError, ProcessLookupError) as error:
        raise PeerLost(f"process {pid} is gone") from error
    except PermissionError as error:
        raise HostError(f"process {pid}: not yours to attach to", "use the user that runs QEMU, or root") from error
    return found


def take_file(pid: int, pidfd: int, device: int, inode: int) -> FileIO | None:
    """A duplicate of a process's descriptor of a regular file, which it stays when that was renamed or unlinked.

    :raise PeerLost: no such process.
    :raise HostError: it may not be looked into.
    """
    for number, link in sorted(descriptors(pid).items()):
        if link.startswith(_MEMFD):
            continue
        # It may close descriptors meanwhile.
        with suppress(OSError):
            if not _is(Path(f"/proc/{pid}/fd/{number}").stat(), device, inode):
                continue
            file = FileIO(pidfd_getfd(pidfd, number))
            if _is(os.fstat(file.fileno()), device, inode):
                return file
    return None


def _is(status: os.stat_result, device: int, inode: int) -> bool:
    return stat.S_ISREG(status.st_mode) and (status.st_dev, status.st_ino) == (device, inode)


def mappings(pid: int, inode: int, device: int) -> list[Mapping]:
    """Where a process maps a file, by address.

    :raise PeerLost: no such process.
    """
    wanted = f"{os.major(device):02x}:{os.minor(device):02x}"
    found = []
    try:
        text = Path(f"/proc/{pid}/maps").read_text(errors="surrogateescape")
    except (FileNotFoundError, ProcessLookupError) as error:
        raise PeerLost(f"process {pid} is gone") from error
    # All processes of the host are asked for one file, and to split their hundreds of lines costs most.
    mark = f" {wanted} {inode} "
    for line in text.splitlines() if mark in text else ():
        if mark not in line:
            continue
        addresses, permissions, offset, where, number, *_ = line.split(maxsplit=5)
        if int(number) == inode and where == wanted:
            start, stop = (int(part, 16) for part in addresses.split("-"))
            found.append(Mapping(start, stop, int(offset, 16), inode, permissions[3] == "s"))
    return found
