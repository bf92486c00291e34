"""Compiles the shim once a source and compiler, into the cache."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

from hvaqemu.errors import HostError
from hvaqemu.paths import cache_dir

SOURCE = Path(__file__).with_name("shim.c")
LIBRARY = "libhvashim.so"
_FLAGS = ("-std=c17", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-fvisibility=hidden")
#: What the dynamic linker takes for a separator or expands in LD_PRELOAD (ld.so(8)).
_NOT_IN_LD_PRELOAD = re.compile(r"[\s:$]")
_COMPILE_SECONDS = 120.0


def _no_progress(_message: str) -> None:
    pass


def _gcc(*arguments: str) -> str:
    """What gcc prints.

    :raise HostError: there is no gcc, or it failed.
    """
    try:
        done = subprocess.run(
            ["gcc", *arguments],
            check=False,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_COMPILE_SECONDS,
            env={**os.environ, "LC_ALL": "C"},
        )
    except FileNotFoundError as error:
        raise HostError("gcc: not found", "install the packages gcc and libc6-dev") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise HostError(f"gcc: {error}") from error
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        said = next((line for line in lines if "error:" in line), lines[0])
        raise HostError(f"gcc: {said}", "install the packages gcc, libc6-dev and linux-libc-dev")
    return done.stdout


def ensure_shim(progress: Callable[[str], None] = _no_progress) -> Path:
    """The compiled shim's path; compiles it where the cache has none for this source and this gcc.

    :param progress: called with a line for the user when there is something to wait for.
    :raise HostError: no compiler, no room, or a cache path that LD_PRELOAD can not carry.
    """
    source = SOURCE.read_bytes()
    version = _gcc("--version") + _gcc("-dumpmachine")
    digest = hashlib.sha256(b"\0".join([source, version.encode(), " ".join(_FLAGS).encode()])).hexdigest()
    folder = cache_dir() / "shim" / digest
    library = folder / LIBRARY
    if _NOT_IN_LD_PRELOAD.search(str(library)):
        raise HostError(
            f"{library.parent}: LD_PRELOAD can not name a path with blanks, ':' or '$'",
            "set HVAQEMU_CACHE_DIR to another place",
        )
    if library.exists():
        return library
    progress("compiling the shim")
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            built = Path(scratch) / LIBRARY
            _gcc(*_FLAGS, "-o", str(built), str(SOURCE))
            built.replace(library)
    except OSError as error:
        raise HostError(
            f"{folder}: {error.strerror}", "make room, or set HVAQEMU_CACHE_DIR to another place"
        ) from error
    return library
