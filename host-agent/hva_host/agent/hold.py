"""The QMP side of HELD: the guest is stopped while a fault must not be answered, and goes on once it is.

QMP ``stop`` is sent and never awaited: a vCPU inside an unanswered fault can not stop, so QEMU may answer only after
the fault is. Only a pause of our own is ever undone.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress

from hvaqemu.errors import HvaError
from hvaqemu.qemu.qmp import QmpLink

_STOP_SECONDS = 10.0


class Hold:
    """One VM's hold, begun and ended as often as needed."""

    def __init__(self) -> None:
        self._task: asyncio.Task[None] | None = None
        self._ours = False

    @property
    def active(self) -> bool:
        """Has it begun and not ended?"""
        return self._task is not None

    def begin(self, qmp: QmpLink | None) -> None:
        """Have the guest stop, unless it is stopped already; returns at once."""
        if self._task is None:
            self._task = asyncio.create_task(self._stop(qmp), name="stop for hold")

    async def end(self, qmp: QmpLink | None) -> None:
        """Let the guest go on, if it was this that stopped it. The fault must have been answered.

        :raise HvaError: QEMU did not answer all the same.
        """
        task, self._task = self._task, None
        if task is None:
            return
        # It must not stop what we let go on.
        await asyncio.wait({task}, timeout=_STOP_SECONDS)
        task.cancel()
        ours, self._ours = self._ours, False
        if ours and qmp is not None:
            await qmp.cont()

    async def cancel(self) -> None:
        """Wait for nothing any more."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.wait({task})

    async def _stop(self, qmp: QmpLink | None) -> None:
        with suppress(HvaError):
            if qmp is not None and (await qmp.status(_STOP_SECONDS)).running:
                self._ours = True
                await qmp.pause(_STOP_SECONDS)
