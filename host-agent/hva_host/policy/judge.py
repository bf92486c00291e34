"""One VM by itself: what a look says of it, and whether anything may be decided.

Nothing is decided on a look that is old, or that was decided on before, nor while a step is under way.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from hva_host.policy import guest_short, pacing, pressure, working_set
from hva_host.policy.decisions import Balloon, Phase, Purpose, Scan, Step, Warn
from hva_host.policy.samples import Condition, VmSample
from hva_host.policy.state import Empty, Facts, Outcome, TargetState, VmMemory
from hvaqemu.pages import PAGE_SHIFT
from hvaqemu.reclaim_config import ReclaimConfig, ReclaimMode

#: A look that is older decides nothing: several looks were missed, and the guest may be another by now.
STALE_SECONDS = 10.0

_ACTIVE = (ReclaimMode.PROACTIVE, ReclaimMode.PRESSURE, ReclaimMode.TARGET)


@dataclass(slots=True)
class Vm:
    """One VM while it is decided on; what is decided is put in."""

    memory: VmMemory
    facts: Facts
    phase: Phase = Phase.IDLE
    reason: str = ""
    next_s: float = 0.0
    step: Step | None = None
    scan: Scan | None = None
    balloon: Balloon | None = None
    warn: Warn | None = None
    #: Nothing may be decided: too old, HELD, a step under way.
    closed: bool = False
    #: Only because a step that policy knows of is under way.
    under_way: bool = False


def judged(memory: VmMemory, sample: VmSample, config: ReclaimConfig, now: float) -> Vm:
    """What one look says of a VM."""
    fresh = sample.at_s > memory.seen_s and now - sample.at_s <= STALE_SECONDS
    outcome = None
    if fresh:
        memory, outcome = _looked(memory, sample, config, now)
        if memory.done is not None and now >= memory.ended_s + pacing.INTERVAL_LEAST:
            memory = replace(_emptied(memory, memory.done, sample, now), done=None)
    resident = sample.backing_bytes >> PAGE_SHIFT
    facts = Facts(
        now=now,
        sample=sample,
        config=config,
        rate=memory.refaults.per_minute,
        working_set=memory.working_set,
        resident=resident,
        unused=working_set.resident_unused(sample),
        spare=max(0, resident - (config.min_resident >> PAGE_SHIFT)),
        outcome=outcome,
        earliest_s=memory.earliest_s,
        unscanned_s=memory.unscanned_s,
    )
    vm = Vm(memory, facts, next_s=now)
    if not fresh:
        vm.closed, vm.phase, vm.reason = True, Phase.BLIND, "its last look is too old, or was decided on"
    elif config.mode not in _ACTIVE:
        vm.closed, vm.reason = True, f"mode {config.mode}"
    elif sample.refused or sample.condition in (Condition.HELD, Condition.AWAY):
        vm.closed, vm.phase, vm.reason = True, Phase.BLIND, sample.refused or f"it is {sample.condition}"
    elif memory.order is not None:
        vm.closed = vm.under_way = True
        vm.phase, vm.reason = _phase_of(memory.order.purpose), "a step is under way"
    elif sample.busy:
        vm.closed = True
        vm.reason = "what was asked of it before is under way"
    return vm


def _looked(memory: VmMemory, sample: VmSample, config: ReclaimConfig, now: float) -> tuple[VmMemory, Outcome | None]:
    """With what is in a look that was not there before, and how the step under way came out."""
    if memory.config != config:
        memory = _set(memory, config)
    elapsed = sample.at_s - memory.seen_s
    earliest_s, unscanned_s, ended_s = memory.earliest_s, memory.unscanned_s, memory.ended_s
    failed_s, order, outcome = memory.failed_s, memory.order, None
    if order is not None:
        epoch = sample.epoch
        if epoch is not None and epoch.number > order.epoch:
            outcome, order = Outcome(order, epoch.discarded, epoch.later), None
            gap = pacing.gap_after_step(sample, outcome, config.cpu_limit)
            ended_s = sample.at_s - epoch.age_s
            earliest_s = max(earliest_s, ended_s + gap)
            unscanned_s = ended_s + pacing.gap_unscanned(sample, outcome, config.cpu_limit)
        elif now - order.at_s > pacing.ORDER_SECONDS or (sample.busy is False and sample.at_s > order.at_s):
            outcome, order = Outcome(order, 0, 0), None
            ended_s = failed_s = now
            unscanned_s = now + pacing.INTERVAL_MOST
            earliest_s = max(earliest_s, unscanned_s)
    if outcome is not None and for_host(outcome.order.purpose):
        memory = _counted(memory, outcome, sample, now, failed=failed_s == now)
    return replace(
        memory,
        seen_s=sample.at_s,
        refaults=memory.refaults.with_point(sample.at_s, sample.refaults.all),
        working_set=working_set.smoothed(memory.working_set, working_set.estimate(sample), elapsed),
        order=order,
        earliest_s=earliest_s,
        unscanned_s=unscanned_s,
        ended_s=ended_s,
        failed_s=failed_s,
        short=guest_short.judged(memory.short, sample, now),
    ), outcome


def _set(memory: VmMemory, config: ReclaimConfig) -> VmMemory:
    """With another config: what was waited for under the one before may be there at once now."""
    if memory.config is None or memory.config.mode is not config.mode:
        # The step under way is still one of this VM; what was learned for another mode is not.
        return VmMemory(config=config, order=memory.order, short=memory.short)
    grown = replace(memory.proactive, until_s=None, rest=None, dull=0, level=0)
    return replace(memory, config=config, proactive=grown, target=TargetState(), empty=Empty())


def _counted(memory: VmMemory, outcome: Outcome, sample: VmSample, now: float, *, failed: bool) -> VmMemory:
    """With what became of a step for the host's sake."""
    if failed:
        # Once may be bad luck; after that others are asked instead.
        if memory.failures:
            memory = _emptied(memory, outcome, sample, now)
        return replace(memory, failures=memory.failures + 1)
    if memory.done is not None:
        # An emergency does not wait for what comes back: that is seen at the end of the step after.
        memory = _emptied(memory, memory.done, sample, now)
    return replace(memory, done=outcome, failures=0)


def _emptied(memory: VmMemory, done: Outcome, sample: VmSample, now: float) -> VmMemory:
    """With the rung on which a step for the host's sake brought little, now that what was wanted at once is back.

    Where more than half came back it brought only work, to the guest and to the host.
    """
    stayed = done.discarded - max(0, sample.refaults.all - done.order.refaults)
    little = min(pacing.little(sample), max(1, done.order.pages // 4))
    if stayed >= max(little, done.discarded // 2):
        return memory
    rung, resident = done.order.rung, max(sample.backing_bytes >> PAGE_SHIFT, done.order.resident)
    if now - memory.empty.at_s < pressure.EMPTY_HARD_SECONDS:
        # What steps that follow one another took from it, and comes back, is nothing new.
        rung, resident = max(rung, memory.empty.rung), max(resident, memory.empty.resident)
    return replace(memory, empty=Empty(rung, now, resident))


def for_host(purpose: Purpose) -> bool:
    """Whether it is done because the host is short."""
    return purpose in (Purpose.PRESSURE, Purpose.EMERGENCY)


def _phase_of(purpose: Purpose) -> Phase:
    return Phase.PRESSED if for_host(purpose) else Phase.GROWING
