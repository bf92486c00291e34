"""Logs that others append to stay bounded: a guest may print on its console for ever, and much of what it does makes
QEMU, the pager or the host agent say something. Their logs lie in host memory on most machines."""

from __future__ import annotations

import asyncio
import os
from contextlib import suppress
from pathlib import Path

LOG_MAX = 4 << 20
_KEPT = 1 << 20
#: Seconds between looks, while no log grew since the last one and while one did: a guest under TCG prints up to some 15
#: MB a second.
_STILL_SECONDS, _LOOK_SECONDS = 2.0, 0.5


def trim(path: Path) -> bool:
    """Cut a log that grew beyond :data:`LOG_MAX` bytes down to its last MiB; was it?

    Whoever writes it must append (O_APPEND), so that it goes on at the new end; what is written while this runs may be
    lost.

    :raise OSError: the log can not be read or written.
    """
    if path.stat().st_size <= LOG_MAX:
        return False
    with path.open("r+b", buffering=0) as file:
        file.seek(-_KEPT, os.SEEK_END)
        tail = file.read(_KEPT)
        file.truncate(0)
        file.seek(0)
        file.write(b"[earlier lines were dropped]\n" + tail.partition(b"\n")[2])
        return True


async def keep_bounded(*paths: Path) -> None:
    """Look at logs, more often while they grow, until cancelled."""
    before: dict[Path, int] = {}
    while True:
        now: dict[Path, int] = {}
        for path in paths:
            # Not there yet, or no room: it is looked at again.
            with suppress(OSError):
                trim(path)
                now[path] = path.stat().st_size
        # Others write them, by descriptors of their own: there is nothing to wait on.
        await asyncio.sleep(_STILL_SECONDS if now == before else _LOOK_SECONDS)
        before = now
