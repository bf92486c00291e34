"""Carrying out policy: looks at VMs and host, asks :mod:`hva_host.policy` what to do, and does it.

Nothing that was decided is owed: what could not be done is seen in the next look, and decided on anew. A VM has one
step at a time; steps of different VMs go on side by side, few at once. While no VM is governed nothing is looked at.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

from hva_host.agent import host_look
from hva_host.agent.chores import Chores
from hva_host.agent.condition import Listener
from hva_host.agent.model import VmState
from hva_host.agent.psi import PressureTrigger
from hva_host.agent.steps import Step as SmallStep
from hva_host.agent.vm import Vm
from hva_host.agent.vm_look import VmLook, asked_pager, store_bytes
from hva_host.policy.decide import decide
from hva_host.policy.decisions import Balloon, Decisions, Scan, Step, Warn
from hva_host.policy.samples import Limits, Look, VmSample
from hva_host.policy.state import PolicyMemory
from hvaqemu.errors import HvaError
from hvaqemu.reclaim_config import ReclaimMode

#: Steps at once: each takes a guest's processor and the host's, which others need too.
_STEPS_MAX = 4
_BALLOON_SECONDS = 10.0
#: Looks closer than this cost more than they tell, whatever asks for them.
_LOOK_LEAST = 0.5
#: A balloon that is to go back because policy no longer decides on its VM is tried so often.
_BACK_SECONDS = 10.0
#: Modes in which policy never does anything.
_UNGOVERNED = (ReclaimMode.OFF, ReclaimMode.MANUAL)


class Governor:
    """The policy of one host agent, over all its VMs.

    :ivar on_decided: told of each look, and of what was decided on it when; None: nobody is.
    :param vms: that there are now.
    :param limits: of the host; those of the VMs are taken from their configs.
    :param tell: told of warnings.
    :param failed: told of a bug in what goes on beside.
    """

    def __init__(
        self,
        vms: Callable[[], Sequence[Vm]],
        limits: Callable[[], Limits],
        tell: Listener,
        failed: Callable[[str, BaseException], None],
    ) -> None:
        self.on_decided: Callable[[float, Look, Decisions], None] | None = None
        self._vms = vms
        self._limits = limits
        self._tell = tell
        self._memory = PolicyMemory()
        self._looks: dict[str, VmLook] = {}
        self._looked_at: dict[str, Vm] = {}
        #: Bytes of backing and store that each VM had when it was looked at last.
        self._held: dict[str, int] = {}
        self._busy: set[str] = set()
        self._slots = asyncio.Semaphore(_STEPS_MAX)
        self._chores = Chores("policy", failed)
        self._poked = asyncio.Event()

    def poke(self) -> None:
        """Something changed that is not to wait for the next look: a VM, its config, the host's pressure."""
        self._poked.set()

    async def run(self) -> None:
        """Go on until cancelled."""
        with PressureTrigger(self.poke):
            try:
                while True:
                    self._poked.clear()
                    began = time.monotonic()
                    wait = await self._round()
                    await self._rest(began, wait)
            finally:
                await self._chores.cancel()

    async def _rest(self, began: float, seconds: float | None) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._poked.wait()
        await asyncio.sleep(max(0.0, began + _LOOK_LEAST - time.monotonic()))

    async def _round(self) -> float | None:
        """Look, decide, begin; seconds until the next look, None while there is nothing to look at."""
        # One that has ended stays listed until somebody has read why.
        vms = [vm for vm in self._vms() if vm.process.alive]
        governed = [vm for vm in vms if vm.config.reclaim.mode not in _UNGOVERNED]
        others = [vm for vm in vms if vm.config.reclaim.mode in _UNGOVERNED]
        self._forget(governed)
        self._held = {vm.name: self._held[vm.name] for vm in vms if vm.name in self._held}
        owed = self._give_back(others)
        limits = self._limits_of(governed)
        if not governed and (limits.budget_bytes is None or not others):
            return _BACK_SECONDS if owed else None
        look = await self._look(governed, others if limits.budget_bytes is not None else ())
        now = time.monotonic()
        self._memory, decisions = decide(self._memory, look, limits, now)
        if self.on_decided is not None:
            self.on_decided(now, look, decisions)
        by_name = {vm.name: vm for vm in governed}
        for view in decisions.views:
            by_name[view.vm].view = view
        self._carry_out(by_name, decisions)
        return decisions.look_again_s

    def _limits_of(self, vms: Iterable[Vm]) -> Limits:
        host = self._limits()
        return Limits(
            {vm.name: vm.config.reclaim for vm in vms},
            host.budget_bytes,
            host.available_bytes,
            host.psi_some,
            host.cgroup_headroom,
            host.balloon,
        )

    def _forget(self, governed: Sequence[Vm]) -> None:
        """VMs that went, and those of a name that came anew."""
        now = {vm.name: vm for vm in governed}
        for name in [name for name, vm in self._looked_at.items() if now.get(name) is not vm]:
            self._looked_at.pop(name).view = None
            del self._looks[name]
            # Also where another VM of that name has come: what is known of one says nothing of the other.
            kept = {other: known for other, known in self._memory.vms.items() if other != name}
            self._memory = replace(self._memory, vms=kept)
        for name in now.keys() - self._looked_at.keys():
            self._looked_at[name], self._looks[name] = (
                now[name],
                VmLook(now[name], partial(self._busy.__contains__, name)),
            )

    async def _look(self, governed: Sequence[Vm], others: Sequence[Vm]) -> Look:
        """:param others: what they hold counts, too."""
        looks = asyncio.gather(*(self._look_at(vm.name) for vm in governed))
        held = asyncio.gather(*(self._held_by(vm) for vm in others))
        samples = [sample for sample in await looks if sample is not None]
        self._held |= {each.name: each.backing_bytes + each.store_bytes for each in samples}
        seen = {each.name for each in samples}
        silent = tuple(vm.name for vm in governed if vm.name not in seen)
        others_bytes = sum(await held) + sum(self._held.get(name, 0) for name in silent)
        host = host_look.look(time.monotonic(), [vm.process.pid for vm in governed])
        return Look(host, tuple(samples), silent, others_bytes)

    async def _look_at(self, name: str) -> VmSample | None:
        with suppress(HvaError):
            return await self._looks[name].look()
        return None

    async def _held_by(self, vm: Vm) -> int:
        """Bytes of one that policy does not decide on; where it does not say, those it had."""
        with suppress(HvaError):
            pager = await asked_pager(vm)
            self._held[vm.name] = int(pager["backing_bytes"]) + store_bytes(pager)
        return self._held.get(vm.name, 0)

    def _give_back(self, vms: Iterable[Vm]) -> bool:
        """Of VMs that policy no longer decides on, what it took by their balloons; is some of it still owed?"""
        # One that does not run can not take it back.
        able = [vm for vm in vms if vm.state is VmState.RUNNING and vm.balloon_bytes is not None]
        owed = [vm for vm in able if vm.record.ballooned_bytes]
        for vm in owed:
            self._begin(vm, f"its mode is {vm.config.reclaim.mode}", partial(vm.balloon_back, _BALLOON_SECONDS))
        return bool(owed)

    def _carry_out(self, vms: dict[str, Vm], decisions: Decisions) -> None:
        for warning in decisions.warnings:
            self._warn(warning)
        wanted: list[Scan | Step | Balloon] = [*decisions.balloons, *decisions.steps, *decisions.scans]
        for decision in wanted:
            if decision.vm in vms:
                vm = vms[decision.vm]
                self._begin(vm, decision.reason, partial(_carried_out, vm, decision))

    def _begin(self, vm: Vm, reason: str, work: Callable[[], Awaitable[object]]) -> None:
        if vm.name not in self._busy:
            self._busy.add(vm.name)
            self._chores.begin(f"{vm.name}: {reason}", self._do(vm, work))

    async def _do(self, vm: Vm, work: Callable[[], Awaitable[object]]) -> None:
        try:
            # What is refused or fails was told by who found the reason, and is seen in the next look.
            with suppress(HvaError):
                async with self._slots:
                    await work()
        finally:
            self._busy.discard(vm.name)

    def _warn(self, warning: Warn) -> None:
        data: dict[str, Any] = {
            "name": warning.vm,
            "complaint": warning.complaint.value,
            "missing_bytes": warning.missing_bytes,
            "reason": warning.reason,
        }
        self._tell("POLICY_WARNING", data)


async def _carried_out(vm: Vm, decision: Scan | Step | Balloon) -> None:
    if isinstance(decision, Balloon):
        await vm.balloon(decision.guest_bytes, _BALLOON_SECONDS, taken=decision.taken_bytes)
    elif isinstance(decision, Scan):
        await vm.reclaimer.scan()
    else:
        await vm.reclaimer.step(decision.states, SmallStep(decision.pages, decision.sampled))
