"""One look at a VM, for policy: what its pager, its processes and its guest say, none of it older than it must be."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from hva_host.agent import accounts
from hva_host.agent.model import EpochStats, VmState
from hva_host.policy.samples import Condition, Epoch, GuestWord, Refaults, Report, VmSample
from hvaqemu.errors import DeadlineExceeded, HvaError
from hvaqemu.pages import PageState

if TYPE_CHECKING:
    from hva_host.agent.vm import Vm

#: How often a guest is asked for its word, in seconds: that wakes it, and its averages are over ten.
_WORD_SECONDS = 10.0
_WORD_TIMEOUT = 2.0
_PAGER_TIMEOUT = 2.0

_CONDITIONS = {
    VmState.RUNNING: Condition.RUNNING,
    VmState.PAUSED: Condition.PAUSED,
    VmState.HELD: Condition.HELD,
}


async def asked_pager(vm: Vm) -> dict[str, Any]:
    """What a pager says of itself, if it does at once: others must not have to wait for it.

    :raise HvaError: it went, or was silent.
    """
    try:
        async with asyncio.timeout(_PAGER_TIMEOUT):
            return await vm.pager_status()
    except TimeoutError as error:
        raise DeadlineExceeded(f"pager: no answer within {_PAGER_TIMEOUT:g} s") from error


class VmLook:
    """Looks at one VM, again and again.

    :param busy: whether something that policy ordered is still being done.
    """

    def __init__(self, vm: Vm, busy: Callable[[], bool]) -> None:
        self._vm = vm
        self._busy = busy
        self._word: GuestWord | None = None
        self._word_at = float("-inf")

    async def look(self) -> VmSample:
        """What there is to see; its time is that of the pager's answer, on the monotonic clock.

        :raise HvaError: the pager went or was silent.
        """
        vm = self._vm
        pager = await asked_pager(vm)
        now = time.monotonic()
        condition = _CONDITIONS.get(vm.state, Condition.AWAY)
        if condition is Condition.RUNNING and now - self._word_at >= _WORD_SECONDS:
            await self._ask(now)
        return VmSample(
            name=vm.name,
            at_s=now,
            condition=condition,
            guest_connected=vm.guest.connected,
            memory_bytes=vm.config.memory,
            refused=vm.refusals.text,
            balloon_bytes=vm.balloon_bytes,
            ballooned_bytes=vm.record.ballooned_bytes,
            pager_cpu_s=accounts.cpu_seconds(vm.pager.pid),
            report=self._report(now),
            epoch=self._epoch(now),
            guest=self._word_now(now),
            busy=self._busy(),
            **_figures(pager),
        )

    async def _ask(self, now: float) -> None:
        # Also one that fails: a guest that does not answer is not asked at every look.
        self._word_at = now
        with suppress(HvaError):
            said = await self._vm.guest.stats(_WORD_TIMEOUT)
            self._word = GuestWord(
                age_s=0.0,
                total_bytes=said.memory_total_bytes,
                available_bytes=said.memory_available_bytes,
                psi_some=_share(said.pressure_percent),
                psi_full=_share(said.full_pressure_percent),
                workingset_refaults=said.workingset_refaults,
            )
            return
        self._word = None

    def _word_now(self, now: float) -> GuestWord | None:
        if self._word is None:
            return None
        word = self._word
        return GuestWord(
            now - self._word_at,
            word.total_bytes,
            word.available_bytes,
            word.psi_some,
            word.psi_full,
            word.workingset_refaults,
        )

    def _report(self, now: float) -> Report | None:
        report = self._vm.reclaimer.report
        if report is None:
            return None
        pages = report.totals
        return Report(
            age_s=now - self._vm.reclaimer.reported_at,
            unused=pages.get(PageState.UNUSED, 0),
            volatile=pages.get(PageState.VOLATILE, 0),
            potential=pages.get(PageState.POTENTIAL, 0),
            stable=pages.get(PageState.STABLE, 0),
        )

    def _epoch(self, now: float) -> Epoch | None:
        reclaimer = self._vm.reclaimer
        if not reclaimer.epochs:
            return None
        # By the guest's own clock: how long its answer took also depends on who else wanted the host.
        scan = reclaimer.report.guest_seconds if reclaimer.report is not None else 0.0
        return epoch_sample(reclaimer.epochs[-1], now - reclaimer.ended_at, scan)


def epoch_sample(stats: EpochStats, age: float, scan: float) -> Epoch:
    """What policy is told of an epoch that ended ``age`` seconds ago.

    :param scan: seconds the guest took for a scan.
    """
    return Epoch(
        number=stats.number,
        age_s=age,
        candidates=stats.candidates,
        discarded_zero=stats.discarded_zero,
        discarded_layer=stats.discarded_layer,
        discarded_store=stats.discarded_store,
        later=stats.later,
        resting=stats.resting,
        scan_s=scan,
        total_s=stats.seconds.total,
        note=stats.note,
        scanned=stats.seconds.scan > 0,
    )


def store_bytes(pager: dict[str, Any]) -> int:
    """Of a store on a disk, the host can have all back that its page cache holds."""
    return int(pager["store_bytes"]) if pager.get("store_file") is None else 0


def _figures(pager: dict[str, Any]) -> dict[str, Any]:
    return {
        "backing_bytes": pager["backing_bytes"],
        "store_bytes": store_bytes(pager),
        "zero_pages": pager["zero_pages"],
        "layer_pages": pager["layer_pages"],
        "preserved_pages": pager["preserved_pages"],
        "refaults": Refaults(pager["zero_refaults"], pager["layer_refaults"], pager["preserved_refaults"]),
        "filled_pages": pager["refault_pages"],
        "stall_s": pager["stalls"]["sum_s"],
        "write_faults": pager["write_faults"],
        # A pager of the version before does not say.
        "cold_pages": pager.get("cold_pages", 0),
    }


def _share(percent: float | None) -> float | None:
    return None if percent is None else percent / 100
