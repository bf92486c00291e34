"""Compiles the project's few C files, each once, into the cache."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from hvaqemu.errors import HostError
from hvaqemu.paths import cache_dir, private_folder

_FLAGS = ("-std=gnu17", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-fvisibility=hidden")
_COMPILE_SECONDS = 120.0


def _no_progress(_message: str) -> None:
    pass


def ensure_library(
    source: Path, *, packages: str, flags: Sequence[str] = (), progress: Callable[[str], None] = _no_progress
) -> Path:
    """The shared library compiled from one C file; compiled where the cache has none for this source and machine.

    :param flags: for the compiler, beyond the project's own.
    :param packages: Debian packages the user must have to compile it, for the hint.
    :param progress: called with a line for the user when there is something to wait for.
    :raise HostError: no compiler, or no room.
    """
    text = source.read_bytes()
    digest = hashlib.sha256(
        b"\0".join([text, platform.machine().encode(), " ".join([*_FLAGS, *flags]).encode()])
    ).hexdigest()
    folder = cache_dir() / "native" / digest[:32]
    library = folder / f"lib{source.stem}.so"
    if library.exists():
        return library
    progress(f"compiling {source.name}")
    try:
        private_folder(folder)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            built = Path(scratch) / library.name
            _gcc([*_FLAGS, *flags, "-o", str(built), str(source)], packages)
            built.replace(library)
    except OSError as error:
        hint = "make room, or set HVAQEMU_CACHE_DIR to another place"
        raise HostError(f"{folder}: {error.strerror}", hint) from error
    return library


def _gcc(arguments: list[str], packages: str) -> None:
    hint = f"install the packages {packages}"
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
            umask=0o077,
        )
    except FileNotFoundError as error:
        raise HostError("gcc: not found", hint) from error
    except subprocess.TimeoutExpired as error:
        raise HostError(f"gcc: gave no result within {_COMPILE_SECONDS:.0f} s") from error
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        said = next((line for line in lines if "error:" in line), lines[0])
        raise HostError(f"gcc: {said}", hint)
