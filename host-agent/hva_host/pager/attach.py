"""Attaching to a running QEMU by pid: first attach and re-attach after a crash are the same.

Order: lock the ledger → register → presence: erase entries of present pages → unprotect everything → wake everyone
(re-delivers what a dead pager had read and not answered) → serve.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from hva_host.memory.backing import Backing
from hva_host.memory.layers import Layer, LayerBetrayed
from hva_host.memory.ledger import LEDGER_NAME, Ledger
from hva_host.memory.syscalls import pidfd_getfd
from hva_host.memory.userfaultfd import Userfaultfd
from hva_host.pager.ram import Ram
from hvaqemu.errors import HostError, PeerLost, RefusedError
from hvaqemu.pages import PAGE_SHIFT, Run

_UFFD = "anon_inode:[userfaultfd]"
_LEDGER = f"/memfd:{LEDGER_NAME} (deleted)"
_STORE = "/memfd:hva-store (deleted)"
_RAM = "/memfd:memory-backend-memfd (deleted)"
_SHIM_HINT = "start QEMU through hvaqemu, or with its shim in LD_PRELOAD"

#: Descriptors of devices that pin guest RAM or map it into another process, so that write protection misses writes.
_PINNING = {
    re.compile(r"/dev/vfio/.*|anon_inode:\[?vfio.*"): "VFIO pins the guest's RAM",
    re.compile(r"/dev/iommu"): "iommufd pins the guest's RAM",
    re.compile(r"/dev/vhost-.*"): "kernel vhost writes guest RAM past QEMU",
    re.compile(r"/dev/vdpa.*|/dev/vhost-vdpa.*"): "vDPA pins the guest's RAM",
}


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
    except FileNotFoundError as error:
        raise PeerLost(f"process {pid} is gone") from error
    except PermissionError as error:
        raise HostError(f"process {pid}: not yours to attach to", "use the user that runs QEMU, or root") from error
    return found


def pinned_by(pid: int) -> str:
    """Why guest RAM can not be protected now, or "". Cheap enough to ask before every epoch.

    :raise PeerLost: no such process.
    """
    for link in descriptors(pid).values():
        for pattern, reason in _PINNING.items():
            if pattern.fullmatch(link):
                return f"{link}: {reason}"
    return ""


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


def attach(pid: int, pidfd: int) -> Ram:
    """Take charge of a QEMU's RAM.

    :raise RefusedError: another pager serves it, or its RAM is not of a kind that can be paged.
    :raise HostError: not permitted.
    :raise PeerLost: it is gone.
    """
    links = descriptors(pid)
    ledger_fd = _take(pidfd, links, _LEDGER, f"process {pid} has no ledger: it runs without the shim")
    store_fd = _take(pidfd, links, _STORE, f"process {pid} has no store: it runs without the shim")
    ram_fd = _take(pidfd, links, _RAM, f"process {pid} has no guest RAM in a memfd")
    uffd = Userfaultfd(_take(pidfd, links, _UFFD, f"process {pid} has no userfaultfd: it runs without the shim"))
    if reason := pinned_by(pid):
        raise RefusedError(reason, "remove the device from the VM")
    _refuse_huge_pages(pid)
    backing = Backing(ram_fd)
    base = _base(pid, backing)
    ledger = Ledger(ledger_fd, backing.pages)
    uffd.handshake()
    uffd.register(base, backing.pages << PAGE_SHIFT)
    ram = Ram(uffd, base, backing, ledger, store_fd)
    _open_layers(ram)
    ram.erase_present(0, ram.pages)
    ram.unprotect(Run(0, ram.pages))
    ram.wake(Run(0, ram.pages))
    return ram


def _take(pidfd: int, links: dict[int, str], wanted: str, missing: str) -> int:
    """A duplicate of the one descriptor with this exact link text; several of one file count as one.

    The text is matched as a whole: QEMU's table also holds ``/dev/userfaultfd`` itself.
    """
    numbers = sorted(number for number, link in links.items() if link == wanted)
    if not numbers:
        raise RefusedError(missing, _SHIM_HINT)
    try:
        taken = [pidfd_getfd(pidfd, number) for number in numbers]
    except PermissionError as error:
        raise HostError("QEMU does not let us take its descriptors", "use the user that runs QEMU, or root") from error
    except OSError as error:
        raise PeerLost("QEMU went while we attached") from error
    inodes = {os.fstat(fd).st_ino for fd in taken}
    for fd in taken[1:]:
        os.close(fd)
    # Anonymous inodes are all the same one, so several userfaultfds show as several descriptors.
    if len(inodes) > 1 or (wanted == _UFFD and len(numbers) > 1):
        os.close(taken[0])
        raise RefusedError(f"QEMU has several {wanted}", "one RAM backend and one shim are supported")
    return taken[0]


def _base(pid: int, backing: Backing) -> int:
    status = os.fstat(backing.fd)
    found = mappings(pid, status.st_ino, status.st_dev)
    if not found:
        raise RefusedError("QEMU does not map its RAM memfd")
    if not all(mapping.shared for mapping in found):
        raise RefusedError("the guest's RAM is mapped privately", "give its memory backend share=on")
    first = found[0]
    position = first.start
    for mapping in found:
        # One region, perhaps split where flags differ: without gaps, in file order.
        if mapping.start != position or mapping.offset != position - first.start:
            raise RefusedError("the guest's RAM is mapped in several places")
        position = mapping.stop
    if position - first.start != backing.pages << PAGE_SHIFT:
        raise RefusedError("the guest's RAM is mapped only in part")
    return first.start


def _refuse_huge_pages(pid: int) -> None:
    """Punching part of a huge page zeroes it in place, and no fault ever comes."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError as error:
        raise PeerLost(f"process {pid} is gone") from error
    if "\nTHP_enabled:\t1" in status:
        raise RefusedError(f"process {pid} may get huge pages: it runs without the shim", _SHIM_HINT)


def _open_layers(ram: Ram) -> None:
    for slot, record in ram.ledger.layers().items():
        try:
            ram.layers[slot] = Layer.recorded(record)
        except LayerBetrayed as error:
            ram.broken[slot] = error.message
