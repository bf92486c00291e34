"""What in a QEMU process makes discarding unsafe, by ``/proc`` alone: nobody has to be asked, nobody can lie.

:func:`refuse` is cheap enough for every epoch. :func:`refuse_at_attach` also reads what costs a walk through all of
guest RAM's page tables or through all processes; after that, the shim's ``PR_SET_THP_DISABLE`` and the host agent's own
look every few seconds (:mod:`hva_host.agent.hazards`) stand for those.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from hva_host.memory.backing import Backing
from hva_host.pager.process_files import descriptors, mappings
from hvaqemu.errors import PeerLost, RefusedError
from hvaqemu.pages import PAGE_SHIFT

SHIM_HINT = "start QEMU through hvaqemu, or with its shim in LD_PRELOAD"
_RAM_FILE = "/memfd:memory-backend-memfd"

#: Descriptors of devices that pin guest RAM or map it into another process, so that write protection misses writes.
_PINNING = {
    re.compile(r"/dev/vfio/.*|anon_inode:\[?vfio.*"): "VFIO pins the guest's RAM",
    re.compile(r"/dev/iommu|anon_inode:\[?iommufd.*"): "iommufd pins the guest's RAM",
    re.compile(r"/dev/vhost-vdpa.*|/dev/vdpa.*"): "vDPA pins the guest's RAM",
    re.compile(r"/dev/vhost-.*"): "kernel vhost writes guest RAM past QEMU",
    re.compile(r"/dev/infiniband/.*"): "RDMA pins the guest's RAM",
    re.compile(r"/dev/udmabuf|/dmabuf.*"): "udmabuf pins the guest's RAM",
}


def pinned_by(pid: int) -> str:
    """Why guest RAM can not be protected now, or "".

    :raise PeerLost: no such process.
    """
    return _pinned(descriptors(pid))


def refuse(pid: int, ram: Backing) -> None:
    """See that nothing makes discarding unsafe now; asked before every epoch.

    :raise RefusedError: something does; says what.
    :raise PeerLost: the process is gone.
    """
    _refuse_strangers(pid)
    links = descriptors(pid)
    if reason := _pinned(links):
        raise RefusedError(reason, "remove the device from the VM")
    status = os.fstat(ram.fd)
    for number, link in links.items():
        if link.startswith(_RAM_FILE) and _inode(pid, number) not in (status.st_ino, 0):
            raise RefusedError("QEMU has several RAM memfds", "remove the memory that was plugged in")
    if "\nTHP_enabled:\t1" in _read(pid, "status"):
        raise RefusedError(f"process {pid} may get huge pages: it runs without the shim", SHIM_HINT)
    if _host_has_huge_shmem():
        _refuse_huge_pages(pid, status)


def refuse_at_attach(pid: int, ram: Backing) -> None:
    """The same, and what is too slow for every epoch.

    :raise RefusedError: something makes discarding unsafe; says what.
    :raise PeerLost: the process is gone.
    """
    refuse(pid, ram)
    status = os.fstat(ram.fd)
    _refuse_huge_pages(pid, status)
    if others := mapped_elsewhere(pid, status):
        raise RefusedError(
            f"the guest's RAM is mapped by other processes too: {', '.join(others)}",
            "nothing but QEMU may map it: no vhost-user, no virtiofsd",
        )


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


def mapped_elsewhere(pid: int, status: os.stat_result) -> list[str]:
    """Processes other than ``pid`` that map its RAM, as far as we may look: "NAME (process PID)".

    Takes some 50 µs a process of the host, so never where a fault may wait.

    :param status: of the RAM's memfd.
    """
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == pid:
            continue
        try:
            if mappings(int(entry.name), status.st_ino, status.st_dev):
                found.append(f"{_name(entry)} (process {entry.name})")
        except (PermissionError, PeerLost):
            # Of another user: it has the memfd only if QEMU gave it away, which QEMU's devices tell.
            continue
    return found


def _pinned(links: Mapping[int, str]) -> str:
    for link in links.values():
        for pattern, reason in _PINNING.items():
            if pattern.fullmatch(link):
                return f"{link}: {reason}"
    return ""


def _refuse_strangers(pid: int) -> None:
    """A user pages its own QEMU, root anybody's; a capability to trace alone is no reason to be let in."""
    me = os.geteuid()
    for line in _read(pid, "status").splitlines():
        if line.startswith("Uid:") and me and {int(uid) for uid in line.split()[1:]} != {me}:
            raise RefusedError(f"process {pid} is another user's", "use the user that runs QEMU, or root")


def _refuse_huge_pages(pid: int, status: os.stat_result) -> None:
    """Punching part of a huge page zeroes it in place, and no fault ever comes."""
    for name, kib in _smaps(pid, status):
        if name in ("ShmemPmdMapped", "FilePmdMapped", "AnonHugePages") and kib:
            raise RefusedError(f"huge pages are behind {kib >> 10} MiB of the guest's RAM", SHIM_HINT)
        if name == "KernelPageSize" and kib << 10 != 1 << PAGE_SHIFT:
            raise RefusedError("the guest's RAM is of huge pages (hugetlb)", "give its memory backend hugetlb=off")


def _smaps(pid: int, status: os.stat_result) -> Iterator[tuple[str, int]]:
    """Names and KiB of the figures of each mapping of a file (proc_pid_smaps(5))."""
    where = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x} {status.st_ino} "
    ours = False
    for line in _read(pid, "smaps").splitlines():
        first, _, rest = line.partition(" ")
        if not first.endswith(":"):
            # "START-STOP PERMISSIONS OFFSET DEVICE INODE …": the figures of this mapping follow.
            ours = f" {where}" in line
        elif ours and rest.endswith(" kB"):
            yield first[:-1], int(rest.split()[0])


def _host_has_huge_shmem() -> bool:
    """Whether any process of the host has shared memory in huge pages: a look that costs next to nothing."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("ShmemHugePages:"):
            return int(line.split()[1]) > 0
    return True


def _inode(pid: int, descriptor: int) -> int:
    try:
        return Path(f"/proc/{pid}/fd/{descriptor}").stat().st_ino
    except FileNotFoundError:
        return 0


def _name(folder: Path) -> str:
    try:
        return (folder / "comm").read_text(errors="replace").strip()
    except OSError:
        return "?"


def _read(pid: int, name: str) -> str:
    """:raise PeerLost: the process is gone."""
    try:
        return Path(f"/proc/{pid}/{name}").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError) as error:
        raise PeerLost(f"process {pid} is gone") from error
