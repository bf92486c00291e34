"""What processes and files really occupy, read from /proc. Sizes are bytes."""

from __future__ import annotations

import ctypes
import mmap
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hvaqemu.pages import PAGE_SIZE, Run

_CGROUP1, _CGROUP2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
_SYS_CACHESTAT = 451
_libc = ctypes.CDLL(None, use_errno=True)
_PAGE_BYTES = os.sysconf("SC_PAGESIZE")
_TICKS = os.sysconf("SC_CLK_TCK")


def _status_kib(pid: int, *names: str) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text(errors="replace").splitlines()
    except OSError:
        return 0
    found = dict(line.split(":", 1) for line in lines if ":" in line)
    return sum(int(found[name].split()[0]) for name in names if name in found)


def own_memory(pid: int) -> int:
    """Resident memory of a process without shared memory: for QEMU, without guest RAM (proc_pid_status(5), RssAnon
    and RssFile); 0 if it is gone."""
    return _status_kib(pid, "RssAnon", "RssFile") * 1024


def all_memory(pid: int) -> int:
    """Resident memory of a process, shared memory included; 0 if it is gone."""
    return _status_kib(pid, "VmRSS") * 1024


def shared_out_memory(pid: int) -> int:
    """A process's memory, what it shares divided by how many share it (proc_pid_smaps(5), Pss), in bytes; 0 if it is
    gone. For pagers, which share most of theirs with the parent they were forked from."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)


def uptime(start_time: int) -> float:
    """Seconds since a process started.

    :param start_time: clock ticks after boot (proc_pid_stat(5), field 22).
    """
    return time.clock_gettime(time.CLOCK_BOOTTIME) - start_time / _TICKS


def cpu_seconds(pid: int) -> float:
    """Time that a process has run on processors, in user and kernel mode; 0.0 if it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / _TICKS


class HostMemory(NamedTuple):
    """What proc_meminfo(5) says; ``available`` is what can be given to something new without swapping."""

    total: int
    available: int
    swap_total: int
    swap_free: int


def host_memory() -> HostMemory:
    """The host's memory."""
    found = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines() if ":" in line)
    names = ("MemTotal", "MemAvailable", "SwapTotal", "SwapFree")
    return HostMemory(*(int(found[name].split()[0]) * 1024 if name in found else 0 for name in names))


def available_to(pid: int) -> int:
    """Memory that a process can still get: what the host has available, or less where a control group of it is limited.

    0: the process is gone.
    """
    try:
        group = control_group(pid)
    except ProcessLookupError:
        return 0
    available = host_memory().available
    return max(0, available if group is None else min(available, group.limit - group.used))


class ControlGroup(NamedTuple):
    """A control group's limit of memory, and what it has of it; page cache not in use does not count."""

    limit: int
    used: int


def control_group(pid: int) -> ControlGroup | None:
    """Of the groups of a process, and those above them, the one that leaves it the least; None: none below the host's
    memory has a limit that we see.

    :raise ProcessLookupError: it is gone.
    """
    try:
        return _tightest([Path(f"/proc/{pid}/cgroup").read_text()])
    except OSError as error:
        raise ProcessLookupError(f"process {pid} is gone") from error


def common_group(pids: Iterable[int]) -> ControlGroup | None:
    """As :func:`control_group`, of the groups that hold all of several processes: what is taken from any of them helps
    in such a one. Those that are gone do not count."""
    memberships = []
    for pid in pids:
        with suppress(OSError):
            memberships.append(Path(f"/proc/{pid}/cgroup").read_text())
    return _tightest(memberships)


def _tightest(memberships: Sequence[str]) -> ControlGroup | None:
    """Of the groups that several processes have in common, each as ``/proc/PID/cgroup`` has them."""
    paths: dict[str, list[str]] = {}
    for line in (line for membership in memberships for line in membership.splitlines()):
        _, controllers, path = line.split(":", 2)
        paths.setdefault(controllers, []).append(path)
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    found: list[ControlGroup] = []
    for controllers, theirs in paths.items():
        path = os.path.commonpath(theirs)
        if not controllers:
            found += _limited(_CGROUP2, path, total, "memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            usage = "memory.usage_in_bytes"
            found += _limited(_CGROUP1, path, total, "memory.limit_in_bytes", usage, "total_inactive_file")
    return min(found, key=lambda group: group.limit - group.used, default=None)


def _limited(mount: Path, path: str, total: int, limit: str, usage: str, cache: str) -> Iterator[ControlGroup]:
    """A group and the groups above it that have a limit below ``total``; none where the path is not below our mount, as
    a container may see it."""
    leaf = mount / path.lstrip("/")
    for group in (leaf, *leaf.parents):
        if not group.is_relative_to(mount):
            break
        with suppress(OSError, ValueError):
            # Version 2 says "max" where there is none, version 1 names one beyond any memory. To count what is used
            # takes the kernel much longer than to say this.
            most = int((group / limit).read_text())
            if most >= total:
                continue
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            yield ControlGroup(most, int((group / usage).read_text()) - int(stat.get(cache, 0)))


def cached_bytes(path: Path) -> int:
    """How much of a file the host's page cache holds, in bytes; 0 if it can not be opened.

    By cachestat(2), before Linux 6.5 by mincore(2). Takes milliseconds for a file of a GiB.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return 0
    try:
        try:
            return _cachestat(fd, 0, 0)[0] * _PAGE_BYTES
        except OSError:
            return _in_core(fd) * _PAGE_BYTES
    finally:
        os.close(fd)


def present_pages(fd: int, runs: Sequence[Run]) -> list[int]:
    """How many pages of each run of a memfd occupy memory, swapped ones included; some 0.05 µs a page.

    :raise OSError: ENOSYS, before Linux 6.5.
    """
    # What a file in shared memory has swapped out counts as evicted (mm/filemap.c, filemap_cachestat).
    return [sum(_cachestat(fd, run.start * PAGE_SIZE, run.pages * PAGE_SIZE)) for run in runs]


def _cachestat(fd: int, start: int, length: int) -> tuple[int, int]:
    """Pages of a part of a file, in bytes, that are cached and that were evicted; length 0 is to its end.

    :raise OSError: ENOSYS, before Linux 6.5.
    """
    part, answer = (ctypes.c_uint64 * 2)(start, length), (ctypes.c_uint64 * 5)()
    if _libc.syscall(_SYS_CACHESTAT, fd, part, answer, 0):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return int(answer[0]), int(answer[3])


def _in_core(fd: int) -> int:
    """Pages of a file in the page cache, by mincore(2): asking touches none of them."""
    size = os.fstat(fd).st_size
    if not size:
        return 0
    pages = -(-size // _PAGE_BYTES)
    found = np.zeros(pages, dtype=np.uint8)
    with mmap.mmap(fd, size, prot=mmap.PROT_READ) as mapping:
        view = np.frombuffer(mapping, np.uint8)
        address = ctypes.c_void_p(view.ctypes.data)
        del view
        done = _libc.mincore(address, ctypes.c_size_t(size), ctypes.c_void_p(found.ctypes.data))
    return int(np.count_nonzero(found & 1)) if done == 0 else 0


def writers(log: Path) -> list[tuple[int, int]]:
    """Pid and start time (clock ticks after boot) of the processes whose standard output is ``log``, as QEMU's is."""
    found = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            if (folder / "fd/1").readlink() == log:
                fields = (folder / "stat").read_text(errors="replace").rpartition(")")[2].split()
                found.append((int(folder.name), int(fields[19])))
        except OSError:
            continue
    return found
