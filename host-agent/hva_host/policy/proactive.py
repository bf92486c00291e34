"""Mode proactive: what is cold goes all the time, in steps that the refault rate decides on.

A step is never larger than what the budget has room for if as much of it comes back as of those before: at first all of
it, so the first ones are as small as the budget. From one step to the next it grows by half at most, while the rate is
below half its budget; near it the room keeps it small. Beyond the budget nothing goes for a while, and each pause that
follows soon on another is twice as long, so a guest whose every page is used is asked ever less often; the rate that
ends a pause (half the budget) is below the one that begins it. Where steps gain little, what came back counted off,
they become rare, then end: only the guest's totals are looked at, until they or what is resident change.

Free pages go in steps of their own, because what they teach about coming back says nothing of pages with content.
"""

from __future__ import annotations

import math
from dataclasses import replace

from hva_host.pager.coldness import REGION, SHARES
from hva_host.policy import pacing
from hva_host.policy.decisions import Phase, Purpose, Scan, Step
from hva_host.policy.rates import WINDOW_SECONDS
from hva_host.policy.state import Facts, Gait, ProactiveState, Rest
from hva_host.policy.verdict import Verdict
from hvaqemu.reclaim_config import ReclaimState

#: Below this share of the budget steps grow, and a pause ends.
GROW_BELOW = 0.5
GROWTH = 1.5
#: Pages that a first sample of a region has: a step takes up to so many more than it is to.
_SAMPLE = int(REGION * SHARES[0])
#: Steps are made for this share of the budget: the rest is for what a guest does by itself meanwhile.
_AIM = 0.75
#: By how much less a step counts than the one after it, in what steps of a kind are taken to do. Some ten of them are
#: remembered: a sample, what goes after it, and others between.
_FORGET = 0.9
_HARM_LEAST = 1e-4
#: A budget is at least so many refaults a minute: 0.6 ms of waiting (10 µs each). Less is what an idle guest's own
#: timers and its agent's scans cause, and would keep small guests from ever being reclaimed.
BUDGET_LEAST = 60.0
#: A pause is at least as long as the window, so that what ends it was all counted after it began.
PAUSE_LEAST, PAUSE_MOST = WINDOW_SECONDS, 600.0
#: Where the budget is exceeded again within this after a pause, the next one is twice as long.
_SOON_SECONDS = 2 * WINDOW_SECONDS
#: A step gained little if less than this share of what it asked for went and stayed away.
_GAIN_WORTH_IT = 0.25
#: Steps in a row that gain little before a VM rests: what one sample of each region brings and what the next does.
_DULL_MOST = 3
#: Where free pages turned out not to be there, or not for long enough, they are tried again after this.
_FREE_SECONDS = 60.0
#: Before that no page of a VM that policy begins with has been free in reports for long enough (agent/steps.py).
_FREE_SEEN_SECONDS = 20.0
#: A resting VM gets a smallest step so often in any case: pages become cold without any total changing.
RESAMPLE_SECONDS = 300.0

_FREE = (ReclaimState.UNUSED,)
_CONTENT = (ReclaimState.VOLATILE, ReclaimState.POTENTIAL, ReclaimState.STABLE)


def budget(refault_budget: float, working_set: float | None) -> float | None:
    """Refaults a minute that a VM may have; None: its working set is not known yet."""
    return None if working_set is None else max(BUDGET_LEAST, refault_budget * working_set)


def decide(state: ProactiveState, facts: Facts) -> Verdict[ProactiveState]:
    """What to do with a VM that can be reclaimed from, and is not short itself."""
    limit = budget(facts.config.refault_budget, facts.working_set)
    if facts.outcome is not None and facts.outcome.order.purpose is Purpose.PROACTIVE:
        state = replace(state, done=facts.outcome)
    if facts.rate is None or limit is None:
        return Verdict(state, Phase.BLIND, "too little is known yet", facts.now)
    if facts.rate > limit or state.until_s is not None:
        state, why = _cooled(state, facts, facts.rate, limit)
        if state.until_s is not None:
            return Verdict(state, Phase.COOLING, why, state.until_s)
    if state.rest is not None:
        if not _woken(state.rest, facts):
            return _resting(state, state.rest, facts)
        # Where nothing changed one smallest step tells whether pages got cold meanwhile.
        probing = facts.now >= state.rest.until_s
        content = replace(state.content, step=0) if probing else state.content
        dull = _DULL_MOST - 1 if probing else 0
        state = replace(state, rest=None, dull=dull, level=0, free_again_s=facts.now, content=content)
    calm = facts.rate < limit * GROW_BELOW
    phase = Phase.GROWING if calm else Phase.HOLDING
    next_s = (facts.unscanned_s if _report_serves(facts) else facts.earliest_s) + _dull_seconds(state)
    if facts.now < next_s:
        return Verdict(state, phase, "between two steps", next_s)
    state = _learned(state, facts)
    if state.rest is not None:
        return _resting(state, state.rest, facts)
    if state.free_again_s == -math.inf:
        # Nothing has been seen to be free for long yet.
        state = replace(state, free_again_s=facts.now + _FREE_SEEN_SECONDS)
    states = _states(state, facts)
    if not states and (due_s := _free_due(state, facts)) > facts.now:
        return Verdict(state, phase, "free pages are tried again later", due_s)
    if not states or pacing.spared(facts.spare, sampled=states != _FREE) < pacing.little(facts.sample):
        why = "nothing of its states is left" if not states else "it has no more than min_resident"
        return _resting(state, _rest(facts), facts, why)
    return _stepped(state, facts, states, facts.rate, limit)


def _stepped(
    state: ProactiveState, facts: Facts, states: tuple[ReclaimState, ...], rate: float, limit: float
) -> Verdict[ProactiveState]:
    """A step that the budget has room for, or none."""
    free = states == _FREE
    gait = state.free if free else state.content
    # If all of the fewest pages came back while the rate is below half its budget, the budget would be used up. Free
    # pages that come back are not read from anywhere: a MiB is the fewest.
    least = pacing.step_least(facts.sample) if free else max(_SAMPLE, int(limit * (1 - GROW_BELOW)) - _SAMPLE)
    room = int((limit * _AIM - rate) / max(_HARM_LEAST, gait.harm))
    spare = pacing.spared(facts.spare, sampled=not free)
    size = min(max(gait.step, least), pacing.step_most(facts.sample), spare, room)
    calm = rate < limit * GROW_BELOW
    if calm:
        size = max(size, min(least, spare))
    elif size < least:
        return Verdict(state, Phase.HOLDING, "its budget has no room for a step", facts.now + pacing.INTERVAL_LEAST)
    reason = f"{rate:.0f} refaults a minute, {'below half' if calm else 'near'} its budget of {limit:.0f}"
    grown = replace(gait, step=int(size * GROWTH) if calm else size)
    state = replace(state, free=grown) if free else replace(state, content=grown)
    step = Step(facts.sample.name, states, size, True, Purpose.PROACTIVE, reason)
    return Verdict(state, Phase.GROWING if calm else Phase.HOLDING, reason, facts.now, step=step)


def _learned(state: ProactiveState, facts: Facts) -> ProactiveState:
    """With what the last step gained and did, now that what was wanted at once has come back."""
    done = state.done
    if done is None:
        return state
    state = replace(state, done=None)
    back = max(0, facts.sample.refaults.all - done.order.refaults)
    free = done.order.states == _FREE
    gait = state.free if free else state.content
    if done.discarded:
        went = _FORGET * gait.went + done.discarded
        gait = replace(gait, went=went, back=_FORGET * gait.back + min(back, done.discarded))
        state = replace(state, free=gait) if free else replace(state, content=gait)
    if done.discarded - back >= max(1, done.order.pages * _GAIN_WORTH_IT):
        return replace(state, dull=0)
    if not free and done.later >= max(pacing.little(facts.sample), done.order.pages) and done.discarded > back:
        # Only first samples have gone of much that is there; whether it is cold will be seen.
        return replace(state, dull=0)
    if free:
        return replace(state, free_again_s=facts.now + _FREE_SECONDS)
    if state.level + 1 < len(_content(facts)):
        return replace(state, level=state.level + 1)
    if state.dull + 1 < _DULL_MOST:
        return replace(state, dull=state.dull + 1)
    return replace(state, dull=0, level=0, rest=_rest(facts))


def _cooled(state: ProactiveState, facts: Facts, rate: float, limit: float) -> tuple[ProactiveState, str]:
    """In a pause, at its end, or at the beginning of one."""
    why = f"{rate:.0f} refaults a minute, more than its budget of {limit:.0f}"
    if state.until_s is not None and facts.now < state.until_s:
        return state, f"a pause after {why}" if rate > limit else "a pause after too many refaults"
    if state.until_s is not None and rate <= limit * GROW_BELOW:
        return replace(state, until_s=None, resumed_s=facts.now), ""
    if state.until_s is not None and rate <= limit:
        # Not calm enough, not worth another pause.
        return replace(state, until_s=facts.now + pacing.INTERVAL_LEAST), "the rate has to fall to half the budget"
    soon = state.until_s is not None or facts.now - state.resumed_s < _SOON_SECONDS
    pause = min(PAUSE_MOST, 2 * state.pause_s) if soon else PAUSE_LEAST
    state = _learned(state, facts)
    return replace(
        state,
        free=_chastened(state.free),
        content=_chastened(state.content),
        until_s=facts.now + pause,
        pause_s=pause,
        rest=None,
        dull=0,
    ), why


def _chastened(gait: Gait) -> Gait:
    """Begins anew with the fewest pages, and is taken to do twice as much."""
    return replace(gait, step=0, back=min(gait.went, 2 * gait.back))


def _content(facts: Facts) -> tuple[ReclaimState, ...]:
    return tuple(each for each in _CONTENT if each in facts.config.states)


def _states(state: ProactiveState, facts: Facts) -> tuple[ReclaimState, ...]:
    """What to try: free pages where there are some, else as much of the content as earlier steps did not exhaust."""
    confirmed = facts.sample.guest_connected and facts.now >= state.free_again_s
    # Two more scans of the guest are worth it only for some pages.
    confirmed = confirmed and facts.now >= facts.earliest_s
    if ReclaimState.UNUSED in facts.config.states and confirmed and facts.unused >= pacing.step_least(facts.sample):
        return _FREE
    return _content(facts)[: state.level + 1]


def _free_due(state: ProactiveState, facts: Facts) -> float:
    """When free pages can be tried; now, where it is not time that they lack."""
    able = ReclaimState.UNUSED in facts.config.states and facts.sample.guest_connected
    if not able or facts.unused < pacing.step_least(facts.sample):
        return facts.now
    return max(state.free_again_s, facts.earliest_s)


def _report_serves(facts: Facts) -> bool:
    """Can pages with content be tried by the report there is?"""
    report, epoch = facts.sample.report, facts.sample.epoch
    if report is None:
        return False
    # A look later it must still do.
    return report.age_s < pacing.report_serves(epoch.scan_s if epoch is not None else 0.0) - pacing.INTERVAL_LEAST


def _dull_seconds(state: ProactiveState) -> float:
    """What a VM's steps wait beyond their pace because the last ones gained little."""
    return min(pacing.INTERVAL_MOST, pacing.INTERVAL_LEAST * 4**state.dull) if state.dull else 0.0


def _rest(facts: Facts) -> Rest:
    report = facts.sample.report
    free, volatile, potential = (report.unused, report.volatile, report.potential) if report else (0, 0, 0)
    return Rest(facts.resident, free, volatile, potential, facts.now + RESAMPLE_SECONDS)


def _woken(rest: Rest, facts: Facts) -> bool:
    """Whether there may be something to gain again."""
    enough = pacing.step_least(facts.sample)
    report = facts.sample.report
    if facts.now >= rest.until_s or facts.resident - rest.resident >= enough:
        return True
    if report is None:
        return False
    states = facts.config.states
    grown = (
        (ReclaimState.UNUSED, report.unused - rest.unused),
        (ReclaimState.VOLATILE, report.volatile - rest.volatile),
        (ReclaimState.POTENTIAL, report.potential - rest.potential),
    )
    return any(pages >= enough for state, pages in grown if state in states)


def _resting(state: ProactiveState, rest: Rest, facts: Facts, why: str = "") -> Verdict[ProactiveState]:
    report = facts.sample.report
    next_s = facts.now - report.age_s + pacing.INTERVAL_MOST if report else facts.now
    scan = None
    if facts.now >= max(next_s, facts.earliest_s) and facts.sample.guest_connected:
        scan = Scan(facts.sample.name, "whether its totals have changed")
    return Verdict(
        replace(state, rest=rest), Phase.RESTING, why or "steps gain little", min(next_s, rest.until_s), scan=scan
    )
