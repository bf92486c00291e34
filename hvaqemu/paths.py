"""Where the project keeps its files: what it built, what runs, and the disks of what runs.

Each is for its owner only: made 0700, or made that; one that all users share (with a sticky bit) is refused. The
environment variables named below take precedence; then the XDG base directories; root gets the system's own places.
"""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from pathlib import Path

from hvaqemu.errors import HostError

#: AF_UNIX addresses end at 108 bytes including the NUL (unix(7)).
SOCKET_PATH_MAX = 107


def private_folder(path: Path) -> None:
    """Make ``path`` and what is missing above it for their owner only, whatever the umask.

    :raise OSError: it can not be made.
    """
    for folder in reversed(path.parents):
        # A file in the way is complained of by what is to come below it.
        with suppress(FileExistsError):
            folder.mkdir(mode=0o700)
    path.mkdir(mode=0o700, exist_ok=True)


def _private(path: Path) -> Path:
    """Make ``path`` (and its parents) and see that it is ours alone.

    :raise HostError: not ours, open to others, or can not be made.
    """
    try:
        private_folder(path)
        status = path.stat()
        if status.st_uid == os.geteuid() and stat.S_IMODE(status.st_mode) & 0o077:
            if status.st_mode & stat.S_ISVTX:
                # What is there for everybody's files is not ours to close.
                raise HostError(f"{path}: is shared by all users", "choose another place")
            path.chmod(0o700)
    except OSError as error:
        raise HostError(f"{path}: {error.strerror}", "make it writable or choose another place") from error
    if status.st_uid != os.geteuid():
        raise HostError(f"{path}: belongs to user {status.st_uid}, not to you", "choose another place")
    return path


def _place(variable: str, for_root: str, xdg: str, fallback: str) -> Path:
    if chosen := os.environ.get(variable):
        return Path(chosen).absolute()
    if os.geteuid() == 0:
        return Path(for_root)
    if base := os.environ.get(xdg):
        return Path(base) / "hvaqemu"
    try:
        return Path(fallback).expanduser()
    except RuntimeError as error:
        raise HostError("no home directory is known", f"set {variable}") from error


def cache_dir() -> Path:
    """Images, layer indexes, the compiled shim; may be deleted at any time. ``HVAQEMU_CACHE_DIR``."""
    return _private(_place("HVAQEMU_CACHE_DIR", "/var/cache/hvaqemu", "XDG_CACHE_HOME", "~/.cache/hvaqemu"))


def runtime_dir() -> Path:
    """Sockets, locks and state of running VMs. ``HVAQEMU_RUNTIME_DIR``.

    :raise HostError: also when the path is too long for a unix socket below it.
    """
    fallback = f"/tmp/hvaqemu-{os.geteuid()}"
    path = _private(_place("HVAQEMU_RUNTIME_DIR", "/run/hvaqemu", "XDG_RUNTIME_DIR", fallback))
    if len(os.fsencode(path)) > 60:
        raise HostError(
            f"{path}: too long for the sockets below it", "set HVAQEMU_RUNTIME_DIR to a path of at most 60 bytes"
        )
    return path


def state_dir() -> Path:
    """Disks that VMs write; not in the runtime directory, which often is host memory. ``HVAQEMU_STATE_DIR``."""
    return _private(_place("HVAQEMU_STATE_DIR", "/var/lib/hvaqemu", "XDG_STATE_HOME", "~/.local/state/hvaqemu"))
