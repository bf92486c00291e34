"""Compiles the shim, and sees that LD_PRELOAD can name it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from hvaqemu.compiler import ensure_library
from hvaqemu.errors import HostError

SOURCE = Path(__file__).with_name("shim.c")
#: What the dynamic linker takes for a separator or expands in LD_PRELOAD (ld.so(8)).
_NOT_IN_LD_PRELOAD = re.compile(r"[\s:$]")


def _no_progress(_message: str) -> None:
    pass


def ensure_shim(progress: Callable[[str], None] = _no_progress) -> Path:
    """The compiled shim's path.

    :param progress: called with a line for the user when there is something to wait for.
    :raise HostError: no compiler, no room, or a cache path that LD_PRELOAD can not carry.
    """
    library = ensure_library(SOURCE, packages="gcc, libc6-dev and linux-libc-dev", progress=progress)
    if _NOT_IN_LD_PRELOAD.search(str(library)):
        raise HostError(
            f"{library.parent}: LD_PRELOAD can not name a path with blanks, ':' or '$'",
            "set HVAQEMU_CACHE_DIR to another place",
        )
    return library
