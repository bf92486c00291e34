"""Sees to it that a living QEMU has a pager: a dead or stuck one is replaced, as often and as long as it takes."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from hva_host.agent.pager_process import PagerHandle, end_holder
from hvaqemu.errors import DeadlineExceeded, HvaError
from hvaqemu.qemu.process import QemuProcess

_RETRY_SECONDS = 0.02
#: How long none could be started before that is said: one that dies while it attaches is no news yet.
_FAILED_SECONDS = 1.0
_RETRY_MAX_SECONDS = 10.0
#: QEMU's end takes its pager with it, and may be seen a moment later.
_QEMU_ENDS_SECONDS = 0.01
#: How often a pager is asked for a sign of life, and how long it may take. Its longest step takes milliseconds.
_ASK_SECONDS = 10.0
_STUCK_SECONDS = 20.0
_KILLED_SECONDS = 5.0


class PagerWatcher(Protocol):
    """Who is told what becomes of a VM's pager."""

    def pager_lost(self) -> None:
        """It died; faults go unanswered."""

    def pager_failed(self, error: Exception) -> None:
        """No other could be started for a while; it is tried again."""

    def pager_back(self, seconds: float) -> None:
        """Another serves, after faults went unanswered for so long."""


async def connect_or_start(pager: PagerHandle, process: QemuProcess, layers: Sequence[tuple[Path, Path]]) -> bool:
    """Connect to the pager there is, or start one; was one started?

    :raise HvaError: none could be started.
    :raise OSError: the host lacks something for it.
    """
    try:
        await pager.adopt()
        return False
    except HvaError:
        # One that is there and does not answer would keep the ledger from the next.
        await end_holder(process.pid)
        await pager.start(process.pid, layers, anew=True)
        return True


async def keep_pager(
    pager: PagerHandle,
    process: QemuProcess,
    layers: Callable[[], Sequence[tuple[Path, Path]]],
    watcher: PagerWatcher,
) -> None:
    """Replace the pager whenever it dies or no longer answers, until QEMU ends or the caller cancels this.

    :param layers: those of the moment; asked anew for each pager.
    """
    pause = _RETRY_SECONDS
    died: float | None = None
    while process.alive:
        await _lost(pager)
        if died is None:
            with contextlib.suppress(DeadlineExceeded):
                await process.wait(_QEMU_ENDS_SECONDS)
                return
            died = time.monotonic()
            watcher.pager_lost()
        try:
            await connect_or_start(pager, process, layers())
        except Exception as error:
            # Whatever it is, never given up while QEMU lives: its vCPUs wait for a pager.
            if time.monotonic() - died > _FAILED_SECONDS:
                watcher.pager_failed(error)
            # What it lacked (memory, a lock, a file) comes without a sign.
            await asyncio.sleep(pause)
            pause = min(pause * 2, _RETRY_MAX_SECONDS)
            continue
        watcher.pager_back(time.monotonic() - died)
        pause, died = _RETRY_SECONDS, None


async def _lost(pager: PagerHandle) -> None:
    """Wait until the pager is gone; one that does not answer is killed, which costs nothing but a pause."""
    while not pager.link.lost.done():
        await asyncio.wait({pager.link.lost}, timeout=_ASK_SECONDS)
        try:
            await pager.link.call("hello", timeout=_STUCK_SECONDS)
        except DeadlineExceeded:
            pager.kill()
            await asyncio.wait({pager.link.lost}, timeout=_KILLED_SECONDS)
            # Lost either way: who has the ledger by now is found when another is started.
            await pager.link.close()
        except HvaError:
            continue
