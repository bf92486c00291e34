"""Mode target: backing and store of a VM stay at a size.

From a little above it down to it, and then rest until the guest has grown by that little again: a controller that acted
on every page would discard what the guest is just about to fill. Each rung of the ladder tries one state more, cold
pages only; the last ones take what is in use as well. A rung that brings little is left for the next; one above the
last is given up for a while, loudly, because a guest that uses more than its target only pays for being pushed.
"""

from __future__ import annotations

from dataclasses import replace

from hva_host.policy import pacing
from hva_host.policy.decisions import Complaint, Phase, Purpose, Step, Warn
from hva_host.policy.state import Facts, TargetState
from hva_host.policy.verdict import Verdict
from hvaqemu.pages import PAGE_SHIFT
from hvaqemu.reclaim_config import ReclaimState
from hvaqemu.units import MiB, format_size

#: How far above the target a VM may grow before it is brought down again: a thirty-second of it, and at least 2 MiB,
#: which the guest agent's own work between two looks uses and frees.
BAND_SHARE, BAND_LEAST = 32, 2 * MiB
#: What can not be reached is tried again after so long, then after twice as long, and so on.
AGAIN_LEAST, AGAIN_MOST = 60.0, 900.0

ORDER = (ReclaimState.UNUSED, ReclaimState.VOLATILE, ReclaimState.POTENTIAL, ReclaimState.STABLE)


def band(target: int) -> int:
    """Bytes above ``target`` at which a VM is brought down."""
    return max(BAND_LEAST, target // BAND_SHARE)


def decide(state: TargetState, facts: Facts) -> Verdict[TargetState]:
    """What to do with a VM that can be reclaimed from, and is not short itself."""
    if facts.outcome is not None and facts.outcome.order.purpose is Purpose.TARGET:
        done, asked = facts.outcome, facts.outcome.order.pages
        state = replace(state, untried=done.discarded < asked // 2 and done.later >= asked)
    target = facts.config.target
    assert target is not None, "checked when the configuration was read"
    size = facts.sample.backing_bytes + facts.sample.store_bytes
    over = size - target
    rungs = _rungs(facts)
    if over <= 0 or (not state.active and over <= band(target)):
        rung = 0 if over <= 0 else state.rung
        rested = replace(state, active=False, before=None, rung=rung, pause_s=0.0 if over <= 0 else state.pause_s)
        return Verdict(rested, Phase.RESTING, f"{format_size(size)}, within its target", facts.now)
    if facts.now < state.until_s:
        return Verdict(state, Phase.RESTING, _missed(size, target), state.until_s, warn=_warn(facts, over))
    if facts.now < facts.earliest_s:
        return Verdict(replace(state, active=True), Phase.GROWING, "between two steps", facts.earliest_s)
    state = _learned(replace(state, active=True), facts, size)
    if pacing.spared(facts.spare, sampled=True) < pacing.little(facts.sample):
        # So near min_resident only steps that are exact are small enough.
        exact = (at for at, rung in enumerate(rungs) if at >= state.rung and not _by_samples(rung))
        state = replace(state, rung=next(exact, len(rungs)))
    if state.rung >= len(rungs) or facts.spare < pacing.little(facts.sample):
        pause = max(AGAIN_LEAST, state.pause_s)
        state = replace(state, rung=0, before=None, until_s=facts.now + pause, pause_s=min(AGAIN_MOST, pause * 2))
        return Verdict(state, Phase.RESTING, _missed(size, target), state.until_s, warn=_warn(facts, over))
    states, sampled = rungs[state.rung]
    most = pacing.step_most(facts.sample)
    spare = pacing.spared(facts.spare, sampled=_by_samples(rungs[state.rung]))
    pages = min(max(over >> PAGE_SHIFT, pacing.little(facts.sample)), most, spare)
    reason = f"{format_size(size)}, {format_size(over)} above its target"
    step = Step(facts.sample.name, states, pages, sampled, Purpose.TARGET, reason)
    state = replace(state, before=size, asked=pages)
    return Verdict(state, Phase.GROWING, reason, facts.now, step=step)


def _learned(state: TargetState, facts: Facts, size: int) -> TargetState:
    """One rung further where the last step, and what came back since, left the VM hardly smaller.

    Of pages in use at least half of what went has to stay away: the rest of them is paid for and not gained.
    """
    if state.before is None:
        return state
    least = min(pacing.little(facts.sample), max(1, state.asked // 2))
    rungs = _rungs(facts)
    if state.rung < len(rungs) and not rungs[state.rung][1]:
        least = max(least, state.asked // 2)
    gained = (state.before - size) >> PAGE_SHIFT
    return replace(state, before=None, untried=False, rung=state.rung + (gained < least and not state.untried))


def _rungs(facts: Facts) -> list[tuple[tuple[ReclaimState, ...], bool]]:
    """States and whether by samples, rung by rung: each state's cold pages, then all pages of each."""
    asked = [each for each in ORDER if each in facts.config.states]
    if not facts.sample.guest_connected:
        # Nobody can confirm free pages.
        asked = [each for each in asked if each is not ReclaimState.UNUSED]
    upto = [tuple(asked[: count + 1]) for count in range(len(asked))]
    # Without samples free pages alone are what they were with them.
    return [(states, True) for states in upto] + [
        (states, False) for states in upto if states != (ReclaimState.UNUSED,)
    ]


def _by_samples(rung: tuple[tuple[ReclaimState, ...], bool]) -> bool:
    """Do pages with content go by samples on it?"""
    states, sampled = rung
    return sampled and states != (ReclaimState.UNUSED,)


def _missed(size: int, target: int) -> str:
    return f"{format_size(size)}, and nothing left to take down to its target of {format_size(target)}"


def _warn(facts: Facts, over: int) -> Warn:
    where = "it has no more than min_resident" if facts.spare <= 0 else f"of states {', '.join(facts.config.states)}"
    return Warn(Complaint.TARGET_MISSED, facts.sample.name, over, f"nothing is left to take ({where})")
