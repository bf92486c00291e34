"""Read leases (fcntl(2), F_SETLEASE): the kernel's own word that nobody has a file open for writing.

A read lease is refused while anybody has the file open for writing, and while one is held, an ``open`` for writing (or
a ``truncate``) waits until the lease is given up, so that the holder hears of a writer before its first byte. What
waits too long takes the lease by force (``/proc/sys/fs/lease-break-time``, 45 s): it is given up at once here.

A break is told by a signal. Ours is SIGURG and not the default SIGIO, nor a real-time signal: the default action of
those is to end the process, and there would be moments (before the handler is set, after it is removed) when somebody's
``open`` kills the host agent. SIGURG is ignored by default, so without its handler a break is only noticed later.
"""

from __future__ import annotations

import asyncio
import enum
import errno
import fcntl
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from hvaqemu.qemu.logs import printable

_SIGNAL = signal.SIGURG
#: The file system has no leases (EINVAL), or the file is another user's and we lack CAP_LEASE.
_NOT_TO_BE_HAD = (errno.EINVAL, errno.EACCES, errno.EPERM, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)


class LeaseState(enum.Enum):
    """What asking for a lease came to."""

    HELD = "held"
    #: Somebody has the file open for writing.
    WRITER = "writer"
    #: This file gives us none.
    NONE = "none"


class Lease:
    """A read lease on an open file, once taken; ends with the descriptor."""

    def __init__(self, fd: int) -> None:
        """:param fd: open for reading only; stays the caller's."""
        self._fd = fd
        self._held = False

    @property
    def held(self) -> bool:
        return self._held

    def renew(self) -> LeaseState:
        """See that the lease is held: a broken one is given up, so that the writer may go on, and a new one asked for.

        :raise OSError: the descriptor is none.
        """
        if self._held and fcntl.fcntl(self._fd, fcntl.F_GETLEASE) == fcntl.F_RDLCK:
            return LeaseState.HELD
        if self._held:
            self._held = False
            fcntl.fcntl(self._fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        try:
            fcntl.fcntl(self._fd, fcntl.F_SETSIG, _SIGNAL)
            fcntl.fcntl(self._fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        except OSError as error:
            if error.errno == errno.EAGAIN:
                return LeaseState.WRITER
            if error.errno in _NOT_TO_BE_HAD:
                return LeaseState.NONE
            raise
        self._held = True
        return LeaseState.HELD


class Breaks:
    """Calls back in the running event loop when a lease of this process is broken, whichever it is: the signal does
    not say. Outside the main thread there is nobody to call, and breaks are found when leases are next looked at."""

    _waiting: set[Callable[[], None]] = set()
    _loop: asyncio.AbstractEventLoop | None = None

    @classmethod
    def join(cls, callback: Callable[[], None]) -> None:
        loop = asyncio.get_running_loop()
        if cls._loop is not loop:
            with suppress(RuntimeError, ValueError):
                loop.add_signal_handler(_SIGNAL, cls._tell)
                cls._loop = loop
        cls._waiting.add(callback)

    @classmethod
    def leave(cls, callback: Callable[[], None]) -> None:
        cls._waiting.discard(callback)
        if not cls._waiting and cls._loop is not None:
            loop, cls._loop = cls._loop, None
            if not loop.is_closed():
                loop.remove_signal_handler(_SIGNAL)

    @classmethod
    def _tell(cls) -> None:
        for callback in list(cls._waiting):
            callback()


def writers(status: os.stat_result) -> list[str]:
    """Who has a file open for writing, as far as /proc and /sys show it to us: "process 12 (dd)", "/dev/loop0".

    Reads the descriptors of every process we may look into: milliseconds, more on a host with many.
    """
    identity = (status.st_dev, status.st_ino)
    found = []
    for folder in sorted(Path("/proc").glob("[0-9]*"), key=lambda path: int(path.name)):
        if any(True for _ in _writing(folder, identity)):
            with suppress(OSError):
                name = printable((folder / "comm").read_text(errors="replace").strip())
                found.append(f"process {folder.name} ({name})")
    for device in sorted(Path("/sys/block").glob("loop*")):
        with suppress(OSError):
            backing = Path((device / "loop/backing_file").read_text().strip()).stat()
            if (backing.st_dev, backing.st_ino) == identity and (device / "ro").read_text().strip() == "0":
                found.append(f"/dev/{device.name}")
    return found


def _writing(folder: Path, identity: tuple[int, int]) -> Iterator[str]:
    """The descriptors of a process that may write a file; those that vanish meanwhile are passed over."""
    try:
        descriptors = list((folder / "fd").iterdir())
    except OSError:
        return
    for descriptor in descriptors:
        with suppress(OSError, ValueError, StopIteration):
            status = descriptor.stat()
            if (status.st_dev, status.st_ino) != identity:
                continue
            lines = (folder / "fdinfo" / descriptor.name).read_text().splitlines()
            flags = int(next(line for line in lines if line.startswith("flags:")).split()[1], 8)
            if flags & os.O_ACCMODE != os.O_RDONLY:
                yield descriptor.name
