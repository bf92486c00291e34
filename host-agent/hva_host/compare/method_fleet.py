"""Launches a VM as a method needs it, and follows what it costs, so that a scenario can be played on it unawares."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress

from hva_host.agent.chores import Chores
from hva_host.agent.model import Measure
from hva_host.compare.balloon_keeper import BalloonKeeper
from hva_host.compare.method import Method
from hva_host.compare.method_vm import BalloonedVm, ReportingVm, UnreclaimedVm, bounds_under
from hva_host.compare.model import GuestCounters, GuestPoint, Probe
from hva_host.compare.probe import probe
from hva_host.compare.seam import ComparedFleet, ComparedVm
from hva_host.compare.vmstat import counters, kills_logged, vmstat
from hva_host.compare.watch import GuestWatch
from hva_host.scenario.seam import PlayedVm
from hvaqemu.config import VmConfig
from hvaqemu.errors import HvaError
from hvaqemu.qemu.logs import one_line, printable
from hvaqemu.reclaim_config import ReclaimConfig

#: Seconds that a balloon's driver has for its first word, after the steps.
_WORD_SECONDS = 5.0


class MethodFleet:
    """One VM's, under one method.

    :param fleet: launches it.
    :param reclaim: how hva would reclaim the VM from its start.
    :ivar first: the VM when its guest first answered; :ivar last: at the end of the steps; None before.
    :ivar counters: what the guest's kernel counted between the two.
    :ivar oom_kills: processes that the guest's kernel has killed for want of memory; :ivar oom_kills_at_least: it may
        be more.
    :ivar failures: what went wrong beside the steps.
    :ivar left: a VM that could not be ended may still be there.
    :ivar probe: whether the method does anything, where that is to be found out.
    """

    def __init__(self, fleet: ComparedFleet, method: Method, reclaim: ReclaimConfig) -> None:
        self.first: Measure | None = None
        self.last: Measure | None = None
        self.counters: GuestCounters | None = None
        self.oom_kills: int | None = None
        self.oom_kills_at_least = False
        self.failures: list[str] = []
        self.left = False
        self.probe: Probe | None = None
        self._fleet = fleet
        self._method = method
        self._reclaim = reclaim
        self._memory = 0
        self._watch: GuestWatch | None = None
        self._said: list[GuestPoint] | None = None
        self._keeper: BalloonKeeper | None = None
        self._counted: GuestCounters | None = None
        self._chores = Chores(f"method {method}", self._on_bug)

    @property
    def guest(self) -> list[GuestPoint]:
        """What the guest said of its memory, up to the end of the steps."""
        if self._said is not None:
            return self._said
        return self._watch.points if self._watch is not None else []

    @property
    def remarks(self) -> list[str]:
        """What a reader of the figures has to know."""
        return self._keeper.remarks if self._keeper is not None else []

    async def up(self, config: VmConfig, progress: Callable[[str], None]) -> PlayedVm:
        """Launch the VM; the method begins.

        :raise HvaError: as the fleet's own.
        """
        vm = await self._fleet.up(config, progress)
        self.left = True
        self._memory = config.memory
        try:
            return await self._begin(vm, config)
        except BaseException:
            # Nobody else knows of it yet.
            with suppress(HvaError):
                await self.down(config.name)
            raise

    async def _begin(self, vm: ComparedVm, config: VmConfig) -> PlayedVm:
        uptime = (await vm.sample()).at_s
        made, self._watch = self._under_method(vm, config, uptime)
        self._chores.begin("the guest's word", self._watch.follow())
        with suppress(HvaError):
            self._counted = counters(await vmstat(made))
        with suppress(HvaError):
            self.first = await vm.measure()
        return made

    def _under_method(self, vm: ComparedVm, config: VmConfig, uptime: float) -> tuple[PlayedVm, GuestWatch]:
        if self._method is Method.HVA:
            return vm, GuestWatch(vm.qmp, uptime)
        if self._method is Method.BALLOON:
            self._keeper = keeper = BalloonKeeper(vm.qmp, bounds_under(self._reclaim, config.memory))
            made = BalloonedVm(vm, keeper, config.memory, self._reclaim)
            return made, GuestWatch(vm.qmp, uptime, keeper.heard)
        if self._method is Method.FREE_PAGE_REPORTING:
            return ReportingVm(vm), GuestWatch(vm.qmp, uptime)
        return UnreclaimedVm(vm), GuestWatch(vm.qmp, uptime)

    async def at_end(self, vm: PlayedVm) -> None:
        """Ask what there is to ask before the VM goes; what does not answer is left out."""
        # What is tried from now on is not the scenario's.
        self._said = list(self.guest)
        with suppress(HvaError):
            self.last = await vm.measure()
        await self._count(vm)
        if vm.failure.done():
            return
        if self._method is Method.FREE_PAGE_REPORTING:
            self.probe = await probe(vm, self._memory)
        if self._keeper is not None and (why := await self._keeper.broken(_WORD_SECONDS)):
            self.probe = Probe(works=False, why=why)

    async def _count(self, vm: PlayedVm) -> None:
        with suppress(HvaError):
            found = await vmstat(vm)
            self.oom_kills = found.get("oom_kill")
            if (now := counters(found)) is not None and self._counted is not None:
                self.counters = now.since(self._counted)
        if self.oom_kills is None and (logged := await asyncio.to_thread(kills_logged, vm.console_log)):
            # A guest that is out of memory may have killed its agent first.
            self.oom_kills, self.oom_kills_at_least = logged, True

    def _on_bug(self, name: str, error: BaseException) -> None:
        self.failures.append(f"a bug in following {name}: {one_line(printable(repr(error)))}")

    async def down(self, name: str) -> str:
        """End the VM; how it ended.

        :raise HvaError: as the fleet's own.
        """
        await self._chores.cancel()
        how = await self._fleet.down(name)
        self.left = False
        return how

    async def close(self) -> None:
        """Let go of everything."""
        await self._chores.cancel()
        await self._fleet.close()
