"""A VM as it is played under a method: what a scenario says of reclaiming becomes what the method makes of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path

from hva_host.agent.model import EpochStats, ExecResult, Measure, ReclaimResult, Sample, VmStatus
from hva_host.agent.ram_frames import RamFrame
from hva_host.compare.balloon import UNIT, Bounds
from hva_host.compare.balloon_keeper import BalloonKeeper
from hva_host.compare.method import goes_on_by_itself
from hva_host.compare.probe import come_to_rest
from hva_host.scenario.seam import PlayedVm
from hvaqemu.errors import RefusedError
from hvaqemu.reclaim_config import ReclaimConfig, ReclaimState


class UnreclaimedVm:
    """A VM of which nobody discards anything: every reclaim is an empty one. All else is the VM's own."""

    def __init__(self, vm: PlayedVm) -> None:
        self._vm = vm
        self._reclaiming = False

    @property
    def console_log(self) -> Path:
        return self._vm.console_log

    @property
    def failure(self) -> asyncio.Future[str]:
        return self._vm.failure

    async def status(self) -> VmStatus:
        return await self._vm.status()

    async def measure(self) -> Measure:
        return await self._vm.measure()

    async def sample(self) -> Sample:
        return await self._vm.sample()

    async def ram_frame(self) -> RamFrame:
        return await self._vm.ram_frame()

    async def execute(
        self, argv: Sequence[str], *, timeout: float, stdin: bytes = b"", limit: int = 1 << 20
    ) -> ExecResult:
        return await self._vm.execute(argv, timeout=timeout, stdin=stdin, limit=limit)

    async def balloon(self, size: int, timeout: float) -> int:
        # A second hand on the balloon would spoil the method that has it.
        raise RefusedError("a balloon step has no place in a comparison")

    async def reclaim(
        self,
        states: Sequence[ReclaimState],
        *,
        epochs: int | None = None,
        on_epoch: Callable[[EpochStats], None] | None = None,
    ) -> ReclaimResult:
        """Nothing, or what the method does instead; until that is done."""
        before = await self._vm.sample()
        await self._settle()
        return without_epochs(before, await self._vm.sample())

    def start_reclaiming(self, states: Sequence[ReclaimState], every: float) -> None:
        """The same, beside whatever else goes on."""
        if self._reclaiming:
            raise RefusedError("a reclaim runs already", "stop it first")
        self._reclaiming = True
        self._go_on(True)

    async def stop_reclaiming(self) -> ReclaimResult:
        """End what :meth:`start_reclaiming` began."""
        if not self._reclaiming:
            raise RefusedError("no reclaim runs")
        self._reclaiming = False
        self._go_on(False)
        now = await self._vm.sample()
        return without_epochs(now, now)

    def set_reclaim(self, reclaim: ReclaimConfig) -> None:
        """Nothing, or what the method makes of a policy that is changed."""

    async def restore(self) -> int:
        """Give the guest what was taken; no page becomes resident by that."""
        return 0

    async def _settle(self) -> None:
        pass

    def _go_on(self, on: bool) -> None:
        pass


class ReportingVm(UnreclaimedVm):
    """A VM whose guest reports free pages by itself: a reclaim is waiting until it has."""

    async def _settle(self) -> None:
        await come_to_rest(self._vm)


class BalloonedVm(UnreclaimedVm):
    """A VM whose balloon takes what its guest's own statistics justify.

    :param memory: the guest's, in bytes.
    :param reclaim: how hva would reclaim the VM from its start.
    """

    def __init__(self, vm: PlayedVm, keeper: BalloonKeeper, memory: int, reclaim: ReclaimConfig) -> None:
        super().__init__(vm)
        self._keeper = keeper
        self._memory = memory
        self._always = False
        self.set_reclaim(reclaim)

    def set_reclaim(self, reclaim: ReclaimConfig) -> None:
        self._always = goes_on_by_itself(reclaim)
        self._keeper.bounds = bounds_under(reclaim, self._memory)
        self._go_on(self._reclaiming)

    async def restore(self) -> int:
        await self._keeper.deflate()
        return 0

    async def _settle(self) -> None:
        await self._keeper.settle()

    def _go_on(self, on: bool) -> None:
        self._keeper.shrinking = on or self._always


def bounds_under(reclaim: ReclaimConfig, memory: int) -> Bounds:
    """What a balloon leaves a guest of ``memory`` bytes: ``min_resident`` binds it where it binds hva, under policy."""
    return Bounds(min(reclaim.min_resident, memory) if goes_on_by_itself(reclaim) else UNIT, memory)


def without_epochs(before: Sample, after: Sample) -> ReclaimResult:
    """What came of a reclaim that is none of hva's."""
    return ReclaimResult(
        epochs=[],
        discarded=0,
        backing_before_bytes=before.backing_bytes,
        backing_after_bytes=after.backing_bytes,
        store_before_bytes=before.store_bytes,
        store_after_bytes=after.store_bytes,
        seconds=after.at_s - before.at_s,
    )
