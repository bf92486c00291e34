"""Reclaiming a VM's memory: one epoch after the other, until it no longer pays, or until told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from hva_host.agent.epochs import Drain, EpochDriver
from hva_host.agent.guest_exchange import ScanReport
from hva_host.agent.guest_link import GuestLink
from hva_host.agent.members import in_turn
from hva_host.agent.model import EpochStats, ReclaimResult
from hva_host.agent.pager_process import PagerHandle, call
from hva_host.agent.steps import Step
from hva_host.pager.coldness import WATCHED_SECONDS
from hvaqemu.errors import DeadlineExceeded, PeerLost, RefusedError
from hvaqemu.reclaim_config import ReclaimState

_EPOCHS_KEPT = 32
_EPOCHS_MAX = 32
#: An epoch that discards less than this share of what was resident ends a reclaim; or less than so many pages, of
#: which half is what the guest agent's own work between two epochs uses and frees.
_GAIN_WORTH_IT = 0.01
_PAGES_WORTH_IT = 256
#: How long after a pager's death, and after an epoch was refused, the next is tried, in seconds.
_RETRY_SECONDS = 0.2
_REFUSED_SECONDS = 0.5


class Reclaimer:
    """The epochs of one VM, never two at once.

    :param protection: how long a page may stay protected, in seconds.
    :param guest: who can be asked now; nobody, where the guest does not run.
    :param check: raises before an epoch that would not be safe.
    :param on_epoch: told of every epoch that ended.
    :param store: bytes the compressed store may occupy.
    :param uptime: seconds since the VM started.
    :param drain: what epochs are bracketed with where a disk does direct I/O.
    :ivar exclusive: held during an epoch, and by whatever must not overlap one.
    :ivar epochs: what the last ones did, oldest first.
    :ivar ended_at: when the last one ended, on the monotonic clock in seconds.
    """

    def __init__(
        self,
        pages: int,
        protection: float,
        guest: Callable[[], GuestLink | None],
        pager: Callable[[], PagerHandle],
        check: Callable[[], Coroutine[Any, Any, None]],
        on_epoch: Callable[[EpochStats], None],
        store: int = 0,
        drain: Drain | None = None,
        uptime: Callable[[], float] = lambda: 0.0,
    ) -> None:
        self._drain = drain
        self._uptime = uptime
        self.exclusive = asyncio.Lock()
        self.epochs: deque[EpochStats] = deque(maxlen=_EPOCHS_KEPT)
        self.ended_at = 0.0
        self._driver = EpochDriver(pages, protection, store)
        self._guest = guest
        self._pager = pager
        self._check = check
        self._on_epoch = on_epoch
        self._task: asyncio.Task[ReclaimResult] | None = None
        self._stop = asyncio.Event()

    @property
    def report(self) -> ScanReport | None:
        """The guest's newest report."""
        return self._driver.report

    @property
    def reported_at(self) -> float:
        """When it came, on the monotonic clock in seconds."""
        return self._driver.reported_at

    def on_pager_event(self, name: str, data: dict[str, Any]) -> None:
        """To be called with every event of the VM's pager."""
        self._driver.on_pager_event(name, data)

    async def reclaim(
        self, states: Sequence[ReclaimState], epochs: int | None, on_epoch: Callable[[EpochStats], None] | None
    ) -> ReclaimResult:
        """Run epochs until one of all ``states`` gains less than 1 %, or exactly ``epochs`` of them.

        :raise RefusedError: something runs or is attached that makes discarding unsafe.
        :raise HvaError: a peer went or was silent.
        """
        began, before = time.monotonic(), await self._memory()
        done: list[EpochStats] = []
        limit = epochs if epochs is not None else _EPOCHS_MAX
        for number in range(limit):
            turn = in_turn(states, number, limit)
            stats = await self._epoch(turn, sift=number == 0)
            done.append(stats)
            if on_epoch is not None:
                on_epoch(stats)
            worth_it = max(_PAGES_WORTH_IT, _GAIN_WORTH_IT * stats.resident_before)
            little = stats.discarded < worth_it and stats.later < worth_it
            if epochs is None and little and len(turn) == len(states):
                break
            if stats.later:
                # A sample of what is left has gone; who uses it must have the time to want it back.
                await asyncio.sleep(WATCHED_SECONDS)
        return await self._result(done, before, began)

    async def step(self, states: Sequence[ReclaimState], step: Step | None) -> EpochStats:
        """One epoch.

        :param step: keeps it small; None: all that is found goes at once.
        :raise RefusedError: something runs or is attached that makes discarding unsafe.
        :raise HvaError: a peer went or was silent.
        """
        return await self._epoch(states, sift=False, step=step)

    async def scan(self) -> None:
        """Have the guest report, if it can be asked. Nothing is discarded."""
        async with self.exclusive:
            if (guest := self._guest()) is not None:
                await self._driver.scan(guest)

    def start(self, states: Sequence[ReclaimState], every: float) -> None:
        """Run an epoch every ``every`` seconds beside whatever else goes on, until :meth:`stop`.

        It pauses while discarding is unsafe or a peer is away, and goes on by itself.

        :raise RefusedError: that is going on already.
        """
        if self._task is not None:
            raise RefusedError("a reclaim runs already", "stop it first")
        self._stop.clear()
        self._task = asyncio.create_task(self._go_on(states, every))

    async def stop(self) -> ReclaimResult:
        """End what :meth:`start` began, after the epoch under way; what it did.

        :raise HvaError: what ended it before.
        """
        task, self._task = self._task, None
        if task is None:
            raise RefusedError("no reclaim runs")
        # Asked to end between two epochs, not inside one.
        self._stop.set()
        return await task

    async def cancel(self) -> None:
        """End what :meth:`start` began, at once; the pager's deadline ends its epoch."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.wait({task})
            if not task.cancelled():
                # Seen, so that asyncio does not complain that nobody asked.
                task.exception()

    async def _epoch(self, states: Sequence[ReclaimState], *, sift: bool, step: Step | None = None) -> EpochStats:
        async with self.exclusive:
            await self._check()
            link = self._pager().link
            stats = await self._driver.run(self._guest(), link, states, sift=sift, drain=self._drain, step=step)
        stats = stats.model_copy(update={"at_s": self._uptime()})
        self.epochs.append(stats)
        self.ended_at = time.monotonic()
        self._on_epoch(stats)
        return stats

    async def _go_on(self, states: Sequence[ReclaimState], every: float) -> ReclaimResult:
        began, before = time.monotonic(), await self._memory()
        done: deque[EpochStats] = deque(maxlen=1000)
        while not self._stop.is_set():
            until = time.monotonic() + every
            try:
                done.append(await self._epoch(in_turn(states, len(done), _EPOCHS_MAX), sift=False))
            except PeerLost:
                # A pager that died is replaced; a VM that ended cancels this.
                until = time.monotonic() + max(every, _RETRY_SECONDS)
            except (RefusedError, DeadlineExceeded):
                # Said loudly by who found the reason (hva_host.agent.refusals); it may go as it came.
                until = time.monotonic() + max(every, _REFUSED_SECONDS)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, until - time.monotonic())):
                    await self._stop.wait()
        return await self._result(list(done), before, began)

    async def _result(self, done: list[EpochStats], before: tuple[int, int], began: float) -> ReclaimResult:
        after = await self._memory()
        return ReclaimResult(
            epochs=done,
            discarded=sum(stats.discarded for stats in done),
            backing_before_bytes=before[0],
            backing_after_bytes=after[0],
            store_before_bytes=before[1],
            store_after_bytes=after[1],
            seconds=time.monotonic() - began,
        )

    async def _memory(self) -> tuple[int, int]:
        """Bytes of backing and of the compressed store."""
        status = await call(self._pager(), "status")
        return int(status["backing_bytes"]), int(status["store_bytes"])
