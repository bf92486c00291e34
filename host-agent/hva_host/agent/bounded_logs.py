"""Logs that others append to stay bounded: a guest may print on its console for ever, and much of what it does makes
QEMU, the pager or the host agent say something. Their logs lie in host memory on most machines."""

from __future__ import annotations

import asyncio
import os
from contextlib import suppress
from pathlib import Path

LOG_MAX = 4 << 20
_KEPT = 1 << 20
#: A guest under TCG prints up to some 15 MB a second.
_LOOK_SECONDS = 0.5


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
    """Look at logs twice a second until cancelled."""
    while True:
        for path in paths:
            # Not there yet, or no room: it is looked at again.
            with suppress(OSError):
                trim(path)
        # Others write them, by descriptors of their own: there is nothing to wait on.
        await asyncio.sleep(_LOOK_SECONDS)
