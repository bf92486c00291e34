"""Reading files without waiting for the disk."""

from __future__ import annotations

import errno
import os
from pathlib import Path

#: File systems that refuse RWF_NOWAIT and yet never wait.
_IN_MEMORY = ("tmpfs", "ramfs")


class NotCached(Exception):
    """The host's page cache does not hold the bytes; reading them will wait for the disk."""


def can_refuse_to_wait(fd: int) -> bool:
    """Can a read of this file fail instead of waiting for the disk (preadv2(2), RWF_NOWAIT)?"""
    try:
        os.preadv(fd, [bytearray(1)], 0, os.RWF_NOWAIT)
    except BlockingIOError:
        return True
    except OSError as error:
        return error.errno != errno.EOPNOTSUPP
    return True


def in_memory(device: int) -> bool:
    """Is the file system with this device number in the host's memory (proc_pid_mountinfo(5))?"""
    number = f"{os.major(device)}:{os.minor(device)}"
    try:
        lines = Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines()
    except OSError:
        return False
    return any(line.split(" - ")[1].split()[0] in _IN_MEMORY for line in lines if line.split()[2] == number)
