"""What in a QEMU process makes discarding unsafe, by ``/proc`` alone: nobody has to be asked, nobody can lie."""

from __future__ import annotations

import os
import re
from pathlib import Path

from hva_host.memory.backing import Backing
from hva_host.pager.process_files import descriptors, mappings
from hvaqemu.errors import PeerLost, RefusedError
from hvaqemu.pages import PAGE_SHIFT

SHIM_HINT = "start QEMU through hvaqemu, or with its shim in LD_PRELOAD"

#: Descriptors of devices that pin guest RAM or map it into another process, so that write protection misses writes.
_PINNING = {
    re.compile(r"/dev/vfio/.*|anon_inode:\[?vfio.*"): "VFIO pins the guest's RAM",
    re.compile(r"/dev/iommu"): "iommufd pins the guest's RAM",
    re.compile(r"/dev/vhost-.*"): "kernel vhost writes guest RAM past QEMU",
    re.compile(r"/dev/vdpa.*|/dev/vhost-vdpa.*"): "vDPA pins the guest's RAM",
}


def pinned_by(pid: int) -> str:
    """Why guest RAM can not be protected now, or "". Cheap enough to ask before every epoch.

    :raise PeerLost: no such process.
    """
    for link in descriptors(pid).values():
        for pattern, reason in _PINNING.items():
            if pattern.fullmatch(link):
                return f"{link}: {reason}"
    return ""


def refuse(pid: int, _ram: Backing) -> None:
    """See that nothing makes discarding unsafe now; asked at attach and before every epoch.

    :raise RefusedError: something does; says what.
    :raise PeerLost: the process is gone.
    """
    if reason := pinned_by(pid):
        raise RefusedError(reason, "remove the device from the VM")
    _refuse_huge_pages(pid)


def mapped_at(pid: int, ram: Backing) -> int:
    """Where the process maps its RAM, whole and once.

    :raise RefusedError: it does not.
    :raise PeerLost: the process is gone.
    """
    status = os.fstat(ram.fd)
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
    if position - first.start != ram.pages << PAGE_SHIFT:
        raise RefusedError("the guest's RAM is mapped only in part")
    return first.start


def _refuse_huge_pages(pid: int) -> None:
    """Punching part of a huge page zeroes it in place, and no fault ever comes."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError as error:
        raise PeerLost(f"process {pid} is gone") from error
    if "\nTHP_enabled:\t1" in status:
        raise RefusedError(f"process {pid} may get huge pages: it runs without the shim", SHIM_HINT)
