"""What a process has open and mapped, as ``/proc`` tells it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from hvaqemu.errors import HostError, PeerLost


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


def mappings(pid: int, inode: int, device: int) -> list[Mapping]:
    """Where a process maps a file, by address.

    :raise PeerLost: no such process.
    """
    wanted = f"{os.major(device):02x}:{os.minor(device):02x}"
    found = []
    try:
        lines = Path(f"/proc/{pid}/maps").read_text(errors="surrogateescape").splitlines()
    except (FileNotFoundError, ProcessLookupError) as error:
        raise PeerLost(f"process {pid} is gone") from error
    for line in lines:
        addresses, permissions, offset, where, number, *_ = line.split(maxsplit=5)
        if int(number) == inode and where == wanted:
            start, stop = (int(part, 16) for part in addresses.split("-"))
            found.append(Mapping(start, stop, int(offset, 16), inode, permissions[3] == "s"))
    return found
