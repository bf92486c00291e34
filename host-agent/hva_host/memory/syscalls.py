"""System calls the standard library lacks, with one errno funnel. Sources: the man page named at each function."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)

_SYS_PIDFD_GETFD = 438
_PR_SET_NAME = 15
_FALLOC_FL_KEEP_SIZE = 0x01
_FALLOC_FL_PUNCH_HOLE = 0x02
_MCL_CURRENT, _MCL_FUTURE, _MCL_ONFAULT = 1, 2, 4
_SYS_USERFAULTFD = {"x86_64": 323, "aarch64": 282, "s390x": 355, "ppc64le": 364}
_USERFAULTFD_IOC_NEW = 0xAA00


def _check(result: int, what: str) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
    return result


def pidfd_getfd(pidfd: int, fd: int) -> int:
    """A duplicate of descriptor ``fd`` of the process behind ``pidfd`` (pidfd_getfd(2)).

    :raise PermissionError: ptrace access to the process is denied.
    :raise OSError: no such descriptor, process gone.
    """
    return _check(_libc.syscall(_SYS_PIDFD_GETFD, pidfd, fd, 0), "pidfd_getfd")


def punch_hole(fd: int, offset: int, length: int) -> None:
    """Give the frames of ``length`` bytes at ``offset`` back; they read as zeros (fallocate(2)).

    :raise OSError: not supported by the file, or interrupted too often.
    """
    while _libc.fallocate(fd, _FALLOC_FL_PUNCH_HOLE | _FALLOC_FL_KEEP_SIZE, offset, length) < 0:
        if ctypes.get_errno() != errno.EINTR:
            _check(-1, "fallocate(PUNCH_HOLE)")


def lock_memory() -> None:
    """Keep what this process maps, and will map, out of swap once touched (mlockall(2), MCL_ONFAULT).

    :raise OSError: RLIMIT_MEMLOCK is too low.
    """
    _check(_libc.mlockall(_MCL_CURRENT | _MCL_FUTURE | _MCL_ONFAULT), "mlockall")


def name_process(name: str) -> None:
    """What tools show this process as, at most 15 bytes (PR_SET_NAME(2const))."""
    _check(_libc.prctl(_PR_SET_NAME, ctypes.create_string_buffer(name.encode()[:15]), 0, 0, 0), "prctl")


def userfaultfd() -> int:
    """A userfaultfd of this process that sees kernel faults too, close-on-exec and non-blocking (userfaultfd(2)).

    :raise OSError: neither ``/dev/userfaultfd`` nor the system call is allowed.
    """
    flags = os.O_CLOEXEC | os.O_NONBLOCK
    try:
        device = os.open("/dev/userfaultfd", os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        number = _SYS_USERFAULTFD.get(os.uname().machine)
        if number is None:
            raise
        return _check(_libc.syscall(number, flags), "userfaultfd")
    try:
        return fcntl.ioctl(device, _USERFAULTFD_IOC_NEW, flags)
    finally:
        os.close(device)
