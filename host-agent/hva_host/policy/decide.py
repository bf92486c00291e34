"""Everything joined: one look in, what to do and what to remember out.

Each VM is judged by itself first (:mod:`hva_host.policy.judge`); then the host is, which may take from VMs whatever
their mode; then the modes decide, for the VMs that nothing was taken from. A VM gets at most one thing to do.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from hva_host.policy import balloon, pacing, pressure, proactive, shortage, target
from hva_host.policy.decisions import (
    REPEAT_SECONDS,
    Balloon,
    Complaint,
    Decisions,
    Phase,
    Scan,
    View,
    Warn,
)
from hva_host.policy.judge import STALE_SECONDS, Vm, for_host, judged
from hva_host.policy.rungs import BALLOON_RUNG, URGENT_RUNG
from hva_host.policy.samples import Condition, HostSample, Limits, Look
from hva_host.policy.state import HostMemory, Order, PolicyMemory, VmMemory
from hva_host.policy.verdict import Verdict
from hvaqemu.reclaim_config import ReclaimMode

#: A guest that could have reported, and did not for so long, is asked before anything is done.
REPORT_SECONDS = 180.0
#: A scan that did not bring a report by then is asked for again.
_SCAN_SECONDS = 30.0
#: Looks are this far apart while something goes on, and while nothing does.
_LOOK_BUSY, _LOOK_IDLE = 1.0, 5.0
#: And so far for each VM there is: deciding on one takes some 50 µs, so that it stays below 1 % of a core.
_LOOK_EACH = 0.005

_TIMED = (ReclaimMode.PROACTIVE, ReclaimMode.TARGET)


def decide(memory: PolicyMemory, look: Look, limits: Limits, now: float) -> tuple[PolicyMemory, Decisions]:
    """What to do now, and what to remember for the next call.

    :param memory: what the last call returned; at first ``PolicyMemory()``.
    :param now: of the looks' clock.
    """
    vms = {
        sample.name: judged(memory.vms.get(sample.name, VmMemory()), sample, limits.reclaim[sample.name], now)
        for sample in look.vms
        if sample.name in limits.reclaim
    }
    silent = {name: memory.vms[name] for name in look.silent if name in memory.vms}
    host = look.host if look.host is not None and now - look.host.at_s <= STALE_SECONDS else None
    remembered, warnings = _for_the_host(memory.host, vms, look, host, limits, now)
    for vm in vms.values():
        if not vm.closed and vm.step is None and vm.balloon is None:
            _by_mode(vm)
        if vm.warn is not None:
            warnings.append(vm.warn)
        _remember_order(vm, now, remembered.rung)
    said, warnings = _not_said_lately(memory.said, warnings, now)
    return (
        PolicyMemory({**silent, **{name: vm.memory for name, vm in vms.items()}}, remembered, said),
        Decisions(
            scans=tuple(vm.scan for vm in vms.values() if vm.scan is not None),
            steps=tuple(vm.step for vm in vms.values() if vm.step is not None),
            balloons=tuple(vm.balloon for vm in vms.values() if vm.balloon is not None),
            warnings=tuple(warnings),
            views=tuple(_view(vm) for vm in vms.values()),
            look_again_s=_LOOK_BUSY if shortage.near(host, limits) else _look_again(vms, remembered, now),
        ),
    )


def _for_the_host(
    state: HostMemory, vms: Mapping[str, Vm], look: Look, host: HostSample | None, limits: Limits, now: float
) -> tuple[HostMemory, list[Warn]]:
    """Take from VMs what the host is missing, or give balloons back."""
    if host is not None:
        state = replace(state, falls=state.falls.seen(host))
    pressed = math.isinf(state.calm_s) and state.need > 0
    wanted = shortage.need(look, host, limits, pressed=pressed, falls=state.falls)
    held = look.held_bytes
    givers = _givers(vms, max(state.rung, URGENT_RUNG) if wanted.urgent else state.rung, now, urgent=wanted.urgent)
    if not wanted.short and not givers:
        # Only the little more is missing, and nobody has it: that is enough.
        wanted = shortage.Need()
    state = pressure.climbed(state, wanted, held, now, able=bool(givers))
    if not wanted.missing:
        if now - state.calm_s >= pressure.CALM_SECONDS and now - state.ballooned_s >= balloon.SECONDS:
            taken = [vm.facts for vm in vms.values() if vm.facts.sample.ballooned_bytes]
            state = _ballooned(state, vms, balloon.deflated(taken, host, limits, held), now)
        return state, []
    givers = _givers(vms, state.rung, now, urgent=wanted.urgent)
    warnings = []
    for step in pressure.steps(givers, wanted, state.rung, held):
        vm = vms[step.vm]
        vm.step, vm.phase, vm.reason = step, Phase.PRESSED, step.reason
        if now < vm.memory.short.until_s:
            reason = f"it is short of memory itself ({vm.memory.short.reason}), and taken from: {step.reason}"
            warnings.append(Warn(Complaint.GUEST_SHORT, step.vm, 0, reason))
    last = state.rung >= min(wanted.highest, BALLOON_RUNG)
    waited = now - state.ballooned_s >= balloon.SECONDS
    if state.rung >= BALLOON_RUNG and limits.balloon and waited:
        guests = [vm.facts for vm in vms.values() if not vm.closed and vm.step is None]
        state = _ballooned(state, vms, balloon.inflated(guests, wanted), now)
        waited = now - state.ballooned_s >= balloon.SECONDS
    if wanted.short and last and waited and not givers:
        left = "" if wanted.highest >= BALLOON_RUNG else " that is worth taking for that"
        reason = f"{wanted.reason}; no VM has anything left{left}"
        warnings.append(Warn(Complaint.NOTHING_LEFT, "", wanted.missing, reason))
    return state, warnings


def _givers(vms: Mapping[str, Vm], rung: int, now: float, *, urgent: bool) -> list[pressure.Giver]:
    """Who may give on a rung, whoever has to be waited for included; not for what has nothing to do with it."""
    found = []
    for vm in vms.values():
        memory = vm.memory
        if vm.closed and not vm.under_way:
            continue
        if not pressure.may_give(vm.facts, rung, memory.empty, short=now < memory.short.until_s):
            continue
        # What is wanted back at once comes back before the next step, but an emergency does not wait for it.
        rested = now >= (memory.failed_s if urgent else memory.ended_s) + pacing.INTERVAL_LEAST
        ready = rested and not vm.under_way
        ordered = memory.order.pages if memory.order is not None and for_host(memory.order.purpose) else 0
        found.append(pressure.Giver(vm.facts, ready, ordered))
    return found


def _ballooned(state: HostMemory, vms: Mapping[str, Vm], balloons: Sequence[Balloon], now: float) -> HostMemory:
    """Put balloons in, and remember when."""
    for each in balloons:
        vm = vms[each.vm]
        vm.balloon, vm.phase, vm.reason = each, Phase.PRESSED, each.reason
    return replace(state, ballooned_s=now) if balloons else state


def _by_mode(vm: Vm) -> None:
    """What the VM's own mode asks for."""
    sample, memory, now = vm.facts.sample, vm.memory, vm.facts.now
    if vm.facts.config.mode is ReclaimMode.PRESSURE:
        _watched(vm)
    elif sample.condition is not Condition.RUNNING:
        vm.phase, vm.reason = Phase.BLIND, f"it is {sample.condition}"
    elif now < memory.short.until_s:
        vm.phase, vm.reason, vm.next_s = Phase.GUEST_SHORT, memory.short.reason, memory.short.until_s
    elif sample.report is None:
        vm.phase, vm.reason = Phase.BLIND, "it never reported"
        vm.scan = Scan(sample.name, vm.reason) if sample.guest_connected else None
    elif vm.facts.config.mode is ReclaimMode.TARGET:
        held = target.decide(memory.target, vm.facts)
        _take(vm, held, replace(memory, target=held.state))
    else:
        grown = proactive.decide(memory.proactive, vm.facts)
        _take(vm, grown, replace(memory, proactive=grown.state))


def _watched(vm: Vm) -> None:
    """Nothing, but once it matters it must be known who is idle, and which pages have been free for a while."""
    report = vm.facts.sample.report
    vm.reason = "the host is not short of memory"
    old = report is None or report.age_s >= pacing.INTERVAL_MOST
    if old and vm.facts.sample.guest_connected and vm.facts.sample.condition is Condition.RUNNING:
        vm.scan = Scan(vm.facts.sample.name, "so that it is known what it could give")


def _take(vm: Vm, verdict: Verdict[Any], memory: VmMemory) -> None:
    """Do what a mode says, unless that was said on an old report: then the guest is asked first."""
    report = vm.facts.sample.report
    old = report is None or report.age_s > REPORT_SECONDS
    if verdict.step is not None and old and vm.facts.sample.guest_connected:
        vm.phase, vm.reason = Phase.BLIND, "it has not reported lately"
        vm.scan = Scan(vm.facts.sample.name, vm.reason)
        return
    vm.memory = memory
    vm.phase, vm.reason, vm.next_s = verdict.phase, verdict.reason, verdict.next_s
    vm.step, vm.scan, vm.warn = verdict.step, verdict.scan, verdict.warn


def _remember_order(vm: Vm, now: float, rung: int) -> None:
    """What was ordered, so that it is not ordered again."""
    if vm.scan is not None:
        if now - vm.memory.scanned_s < _SCAN_SECONDS:
            vm.scan = None
            return
        earliest_s = max(vm.memory.earliest_s, now + pacing.gap_after_scan(vm.facts.sample))
        vm.memory = replace(vm.memory, scanned_s=now, earliest_s=earliest_s)
    if vm.step is not None:
        step, sample = vm.step, vm.facts.sample
        epoch = sample.epoch.number if sample.epoch is not None else -1
        order = Order(
            epoch,
            now,
            step.states,
            step.pages,
            step.sampled,
            step.purpose,
            rung,
            sample.pager_cpu_s,
            sample.refaults.all,
            vm.facts.resident,
        )
        vm.memory = replace(vm.memory, order=order)


def _not_said_lately(
    said: Mapping[tuple[Complaint, str], float], warnings: Sequence[Warn], now: float
) -> tuple[dict[tuple[Complaint, str], float], list[Warn]]:
    """When each warning was said last, and those that are to be said now."""
    kept = {key: at_s for key, at_s in said.items() if now - at_s < REPEAT_SECONDS}
    due = [warn for warn in warnings if (warn.complaint, warn.vm) not in kept]
    return {**kept, **{(warn.complaint, warn.vm): now for warn in due}}, due


def _view(vm: Vm) -> View:
    facts, memory = vm.facts, vm.memory
    budget = proactive.budget(facts.config.refault_budget, facts.working_set)
    return View(
        vm=facts.sample.name,
        phase=vm.phase,
        working_set=None if memory.working_set is None else int(memory.working_set),
        refault_rate=facts.rate,
        budget=budget,
        step=memory.proactive.content.step,
        next_s=vm.next_s,
        reason=vm.reason,
    )


def _look_again(vms: Mapping[str, Vm], host: HostMemory, now: float) -> float:
    """Seconds until something can have changed that is decided on."""
    if math.isinf(host.calm_s) and host.need:
        return _LOOK_BUSY
    busy = min(_LOOK_IDLE, max(_LOOK_BUSY, _LOOK_EACH * len(vms)))
    if any(vm.step or vm.scan or vm.balloon or vm.memory.order for vm in vms.values()):
        return busy
    due = min((vm.next_s for vm in vms.values() if vm.facts.config.mode in _TIMED and vm.next_s > now), default=now)
    return min(_LOOK_IDLE, max(busy, due - now)) if due > now else _LOOK_IDLE
