"""What processes and files really occupy, read from /proc. Sizes are bytes."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np

_CGROUP1, _CGROUP2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
_SYS_CACHESTAT = 451
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


def available() -> int:
    """Memory the host can give to something new without swapping (proc_meminfo(5), MemAvailable)."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0


def available_to(pid: int) -> int:
    """Memory that a process can still get: what the host has available, or less where a control group of it is limited.

    0: the process is gone.
    """
    least = available()
    try:
        lines = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
    except OSError:
        return 0
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            least = min(least, _headroom(_CGROUP2, path, "memory.max", "memory.current", "inactive_file"))
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            least = min(least, _headroom(_CGROUP1, path, *names))
    return max(0, least)


def _headroom(mount: Path, path: str, limit: str, usage: str, cache: str) -> int:
    """The least that a group and the groups above it leave, page cache not in use counted as free.

    Without a limit it is beyond any memory; so it is where the path is not below our mount, as a container may see it.
    """
    leaf, least = mount / path.lstrip("/"), sys.maxsize
    for group in (leaf, *leaf.parents):
        if not group.is_relative_to(mount):
            break
        with suppress(OSError, ValueError):
            most = int((group / limit).read_text())
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            least = min(least, most - int((group / usage).read_text()) + int(stat.get(cache, 0)))
    return least


def cached_bytes(path: Path) -> int:
    """How much of a file the host's page cache holds, in bytes; 0 if it can not be opened.

    By cachestat(2), before Linux 6.5 by mincore(2). Takes milliseconds for a file of a GiB.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return 0
    try:
        everything, answer = (ctypes.c_uint64 * 2)(0, 0), (ctypes.c_uint64 * 5)()
        if ctypes.CDLL(None).syscall(_SYS_CACHESTAT, fd, everything, answer, 0) == 0:
            return int(answer[0]) * _PAGE_BYTES
        return _in_core(fd) * _PAGE_BYTES
    finally:
        os.close(fd)


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
        done = ctypes.CDLL(None).mincore(address, ctypes.c_size_t(size), ctypes.c_void_p(found.ctypes.data))
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
