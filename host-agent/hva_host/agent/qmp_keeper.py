"""Sees to it that a living QEMU is listened to: a lost monitor is connected again, and what was missed is caught up."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress

from hvaqemu.errors import HvaError
from hvaqemu.qemu.process import QemuProcess
from hvaqemu.qemu.qmp import QmpLink

_RETRY_SECONDS = 0.5


async def keep_qmp(qmp: QmpLink, process: QemuProcess, follow: Callable[[], Awaitable[None]]) -> None:
    """Connect whenever the connection is lost, until QEMU ends or the caller cancels this.

    :param follow: catches up with what happened while nobody listened; tried again, as connecting is, if it fails.
    """
    followed = qmp.connected
    while process.alive:
        if followed:
            await qmp.lost()
            followed = False
        with suppress(HvaError):
            if not qmp.connected:
                await qmp.connect()
            await follow()
            followed = True
            continue
        # QEMU serves one client at a time, and nothing tells when the one there is has gone.
        await asyncio.sleep(_RETRY_SECONDS)
