"""HELD: pages whose bytes can not be trusted, so that faults on them stay unanswered, and what that means for QMP.
And the other reason to pause a guest: direct I/O that began before pages were protected has to end.

It is a state of the pager and of the host agent, never of QMP, and everything an operator needs in it works without
QMP. The guest is stopped beside the vCPU that waits, so that its others do not run on without it; but ``stop`` is sent
and never awaited, because a vCPU inside an unanswered fault can not stop, and QEMU's main loop may itself be the one
that waits. Only a pause of our own is ever undone: it is recorded before it is sent, so that the next host agent knows.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress

from hva_host.agent.model import HeldPages
from hvaqemu.errors import DeadlineExceeded, HvaError, RefusedError
from hvaqemu.faultpoints import reach
from hvaqemu.qemu.qmp import QmpLink

_QMP_SECONDS = 10.0
#: How long I/O may take to end while the guest stands still for it.
_DRAIN_SECONDS = 5.0
_PAGES_NAMED = 4


class Hold:
    """One VM's hold, begun and ended as often as needed.

    :param paused: a host agent before us has stopped the guest for a hold.
    :param record: called before ``stop`` is sent, and after ``cont`` was: is the guest's pause ours? Where it can not
        be recorded that it is, it raises HvaError, and nothing is paused.
    :ivar pages: what is held, as the pager says it.
    :ivar pausing: held while one looks whether the guest runs, and then stops it: by us, or by an operator through us.
    :ivar draining: the guest is paused, and let go on, for a moment: nobody need hear of it.
    """

    def __init__(self, paused: bool, record: Callable[[bool], None]) -> None:
        self.pages: tuple[HeldPages, ...] = ()
        self._no_pager = ""
        self._paused = paused
        self._record = record
        self._task: asyncio.Task[None] | None = None
        self._undoing = asyncio.Lock()
        self.pausing = asyncio.Lock()
        self.draining = False

    @property
    def active(self) -> bool:
        """Are pages held, or is there no pager to answer anything?"""
        return bool(self.pages or self._no_pager)

    @property
    def reason(self) -> str:
        """What is held and why, in one line; "" if nothing is."""
        return "; ".join(filter(None, (self._no_pager, *map(describe, self.pages))))

    def refuse(self, name: str) -> None:
        """See that what needs a running guest has one.

        :raise RefusedError: the VM is held; names the file, the pages and what to do.
        """
        if self.active:
            hint = f"put that right, then 'hvaqemu resume {name}', or end it by 'hvaqemu down {name}'"
            raise RefusedError(f"VM {name} is HELD: {self.reason}", hint)

    def begin(self, pages: Sequence[HeldPages], qmp: QmpLink) -> None:
        """These pages are held now; the guest is made to stop, unless it is stopped already. Returns at once."""
        self.pages = tuple(pages)
        self._see_stopped(qmp)

    def without_pager(self, why: str) -> None:
        """Nobody answers faults, and nobody could be found who will: ``why``; "": somebody was."""
        self._no_pager = f"no pager can be started: {why}" if why else ""

    def end(self) -> None:
        """No page is held any more; :meth:`let_go` is to follow."""
        self.pages = ()

    async def let_go(self, qmp: QmpLink) -> None:
        """Let the guest go on, if it was this that stopped it.

        Where there is no QMP to say so, :meth:`connected` does it once there is.
        """
        await self.cancel()
        with suppress(HvaError):
            await self.connected(qmp)

    async def released(self, qmp: QmpLink) -> None:
        """As :meth:`let_go`, for somebody who wants to know that it was done: a main loop that waited for a page may
        have cost us the monitor, which is connected again once the page is there.

        :raise HvaError: QEMU went, or did not answer.
        """
        if self._paused:
            await qmp.wait_connected(_QMP_SECONDS)
            await self.connected(qmp)

    async def connected(self, qmp: QmpLink) -> None:
        """QMP answers (again): see that a held guest stands still, or undo a pause of ours that is not needed any more.

        :raise HvaError: QEMU went, or did not answer.
        """
        if self.pages:
            self._see_stopped(qmp)
            return
        # Once: a second ``cont`` could undo somebody else's pause that came after the first.
        async with self._undoing:
            if self._paused and not self.pages:
                await qmp.cont(_QMP_SECONDS)
                reach("agent.drain.resumed")
                self._paused = False
                self._record(False)

    async def drain(self, qmp: QmpLink) -> float:
        """Stop the guest, which has QEMU end all its I/O, and let it go on; seconds it stood still for that.

        A guest that somebody else has paused has no I/O under way, and stays paused. Cancelled, it is let go on first.

        :raise RefusedError: it is held.
        :raise HvaError: QEMU went, or did not end its I/O in time; a pause of ours is undone once it answers.
        """
        work = asyncio.create_task(self._drain(qmp), name="drain")
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            await asyncio.wait({work})
            # Seen, so that asyncio does not complain that nobody asked.
            if not work.cancelled():
                work.exception()
            raise

    async def _drain(self, qmp: QmpLink) -> float:
        async with self.pausing:
            # One of ours that could not be undone before: QMP was silent then.
            await self.connected(qmp)
            if self.active:
                raise RefusedError(f"HELD: {self.reason}")
            if not (await qmp.status(_QMP_SECONDS)).running:
                return 0.0
            self._record(True)
            self._paused = self.draining = True
            reach("agent.drain.recorded")
            began = time.monotonic()
            try:
                await qmp.pause(_DRAIN_SECONDS)
                reach("agent.drain.stopped")
            finally:
                try:
                    await self.connected(qmp)
                finally:
                    self.draining = False
            return time.monotonic() - began

    @asynccontextmanager
    async def by_operator(self, qmp: QmpLink) -> AsyncIterator[None]:
        """Inside, an operator pauses the guest or lets it go on.

        Not between a look of ours and our ``stop`` or ``cont``; and after a pause of ours that could not be undone
        when its time came, or that would be undone later in place of theirs.

        :raise HvaError: QEMU went, or did not answer.
        """
        async with self.pausing:
            await self.connected(qmp)
            yield

    async def cancel(self) -> None:
        """Wait for nothing any more."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.wait({task})

    def _see_stopped(self, qmp: QmpLink) -> None:
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._stop(qmp), name="stop for hold")

    async def _stop(self, qmp: QmpLink) -> None:
        with suppress(HvaError):
            while self.pages:
                async with self.pausing:
                    try:
                        running = (await qmp.status(_QMP_SECONDS)).running
                    except DeadlineExceeded:
                        # The main loop is what waits; it runs no vCPU that needs it. It may come free by a refault.
                        continue
                    if running:
                        self._record(True)
                        self._paused = True
                        await qmp.pause(_QMP_SECONDS)
                    return


def describe(held: HeldPages) -> str:
    """What is held of one layer, in one line."""
    named = ", ".join(map(str, held.pages[:_PAGES_NAMED]))
    more = len(held.pages) - _PAGES_NAMED
    pages = f"page {named}" if len(held.pages) == 1 else f"pages {named}" + (f" and {more} more" if more > 0 else "")
    where = "" if held.layer in held.reason else f"{held.layer}: "
    return f"{where}{held.reason} ({pages})"
