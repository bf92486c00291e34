"""The privileges hvaqemu can make use of, what this process has of each, and what works without it.

One is needed: to make a userfaultfd that sees system calls' faults too (:mod:`hva_host.doctor` tries it). All others
only make things better. Each check tries the real thing and takes it back.
"""

from __future__ import annotations

import os
import resource
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from hva_host.agent.leases import Lease, LeaseState
from hvaqemu.errors import HvaError
from hvaqemu.qemu.host_network import new_name, open_tap
from hvaqemu.units import MiB, format_size

_YAMA = Path("/proc/sys/kernel/yama/ptrace_scope")
_OOM = Path("/proc/self/oom_score_adj")
#: The lowest limit that mlockall(2) of a pager is sure to fit in: all it has mapped counts, touched or not.
_LOCKED = 1024 * MiB
_CAP_IPC_LOCK = 14
_CAP_SYS_PTRACE = 19


class Privilege(NamedTuple):
    """One privilege."""

    name: str
    held: bool
    #: What there is, or what is the case without it.
    found: str
    #: How to get it; "" where it is held.
    advice: str
    #: Nothing works without it.
    needed: bool = False


def privileges(cache: Callable[[], Path]) -> list[Privilege]:
    """All but the userfaultfd.

    :param cache: where layers are kept.
    """
    return [_user(), _ptrace(), _locked_memory(), _oom(), _leases(cache), _tap()]


def _user() -> Privilege:
    root = os.geteuid() == 0
    found = "root; an ordinary user who may open /dev/userfaultfd would do" if root else f"ordinary user {os.geteuid()}"
    return Privilege("user", True, found, "")


def _ptrace() -> Privilege:
    """pidfd_getfd(2) of QEMU's descriptors asks for ptrace access; the shim allows it where scope 1 restricts it."""
    scope = _read(_YAMA) or "0"
    if scope in ("0", "1") or (scope == "2" and _capable(_CAP_SYS_PTRACE)):
        return Privilege("ptrace of one's own QEMU", True, f"allowed (yama scope {scope})", "")
    return Privilege(
        "ptrace of one's own QEMU",
        False,
        f"yama scope {scope}: a pager can not take QEMU's descriptors",
        f"as root: echo 1 > {_YAMA}" if scope == "2" else "boot without kernel.yama.ptrace_scope=3",
        needed=True,
    )


def _locked_memory() -> Privilege:
    name = "locked memory"
    _, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if _capable(_CAP_IPC_LOCK) or hard == resource.RLIM_INFINITY or hard >= _LOCKED:
        return Privilege(name, True, "pagers are locked in memory", "")
    return Privilege(
        name,
        False,
        f"limit {format_size(hard)}: pagers are not locked; on a host that swaps, a refault may wait for the swap",
        "raise the memlock limit of this user to unlimited (limits.conf(5), LimitMEMLOCK= in a unit)",
    )


def _oom() -> Privilege:
    name = "last for the OOM killer"
    before = _read(_OOM)
    try:
        _OOM.write_text(str(max(-1000, int(before or 0) - 1)))
        _OOM.write_text(before)
    except (OSError, ValueError):
        found = "not allowed: the host's OOM killer may pick a pager, which is then replaced, and its guest waits"
        return Privilege(name, False, found, "CAP_SYS_RESOURCE (AmbientCapabilities= in a unit), or start as root")
    return Privilege(name, True, "pagers are picked last", "")


def _leases(cache: Callable[[], Path]) -> Privilege:
    """Of a file of our own, where layers are. Another user's image would need CAP_LEASE."""
    name = "read leases on layers"
    try:
        with tempfile.TemporaryFile(dir=cache()) as file:
            fd = os.open(f"/proc/self/fd/{file.fileno()}", os.O_RDONLY | os.O_CLOEXEC)
            try:
                # The file is open for writing, by us: the kernel says so where it knows of leases at all.
                granted = Lease(fd).renew() is not LeaseState.NONE
            finally:
                os.close(fd)
    except (OSError, HvaError):
        granted = False
    if granted:
        return Privilege(name, True, "the kernel tells of a writer before its first byte", "")
    return Privilege(
        name,
        False,
        "not on this file system: a writer is found in /proc, or by what it changed, within seconds",
        "put HVAQEMU_CACHE_DIR on ext4, xfs, btrfs or tmpfs, and own the images",
    )


def _tap() -> Privilege:
    """A tap device is gone with its descriptor."""
    name = "tap networks"
    try:
        os.close(open_tap(new_name()))
    except OSError as error:
        found = f"not allowed ({error.filename}: {error.strerror}); network: user and none work without"
        return Privilege(name, False, found, "be root, or have CAP_NET_ADMIN and access to /dev/net/tun")
    return Privilege(name, True, "allowed", "")


def _capable(number: int) -> bool:
    """Whether a capability is in effect (capabilities(7))."""
    try:
        lines = Path("/proc/self/status").read_text(errors="replace").splitlines()
        effective = next(line for line in lines if line.startswith("CapEff:"))
    except (OSError, StopIteration):
        return False
    return bool(int(effective.split()[1], 16) >> number & 1)


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
