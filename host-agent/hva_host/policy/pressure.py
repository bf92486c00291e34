"""The host is short (:mod:`hva_host.policy.shortage`): how hard is tried, and from whom it is taken.

A rung is left for the next when it brought little of what was missing, from the third on also as soon as
nobody has anything left on it; the first two are left out where the host has hardly anything left. The ladder is gone
down only once nothing was missing for a while. What is taken in a round is bounded, so that a wrong look at the host
costs no more than that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from hva_host.policy import pacing, sharing
from hva_host.policy.decisions import Purpose, Step
from hva_host.policy.rungs import RUNGS, URGENT_RUNG
from hva_host.policy.samples import Condition
from hva_host.policy.shortage import Need
from hva_host.policy.state import Empty, Facts, HostMemory
from hvaqemu.pages import PAGE_SHIFT
from hvaqemu.reclaim_config import ReclaimMode, ReclaimState
from hvaqemu.units import MiB

#: A round takes at most this share of what all VMs hold (in an emergency the larger one), and at least 64 MiB: a few
#: seconds of one core.
_ROUND_SHARE, _ROUND_SHARE_URGENT, _ROUND_LEAST = 1 / 16, 1 / 8, 64 * MiB
#: How long a rung is given: what a region's samples take to become all of it, a step each.
RUNG_SECONDS = 10.0
#: A rung that brought at least this part of what was missing is kept.
_RUNG_WORTH_IT = 0.25
#: Nothing has to be missing for so long before the ladder is left: PSI's 10 s average, three times.
CALM_SECONDS = 30.0
#: How long a VM that gave nothing on a rung is not asked there again: until samples were watched and free pages have
#: been free for a while; and, where it was asked for pages in use, as long as it takes to become another guest.
EMPTY_SECONDS, EMPTY_HARD_SECONDS = 10.0, 60.0
#: One that has got this part of the largest step since is asked at once: a guest that fills its memory gives it best.
_GROWN_PARTS = 4
#: In an emergency what is needed is asked for in so many pieces: a scan and an epoch take as long for a MiB as for 64,
#: and more of them than the driver runs at once would only wait for one another.
_PIECES_URGENT = 4

_MODES = (ReclaimMode.PROACTIVE, ReclaimMode.PRESSURE, ReclaimMode.TARGET)


@dataclass(frozen=True, slots=True)
class Giver:
    """A VM that may give.

    :ivar ready: it can have a step now.
    :ivar ordered: pages that a step for the host's sake which is under way may still bring.
    """

    facts: Facts
    ready: bool = True
    ordered: int = 0

    @property
    def name(self) -> str:
        return self.facts.sample.name


def climbed(state: HostMemory, wanted: Need, held: int, now: float, *, able: bool) -> HostMemory:
    """On which rung to be now.

    :param held: bytes of backing and store of all VMs.
    :param able: somebody has something to give on the present rung, or is giving it.
    """
    if not wanted.missing:
        if state.calm_s > now:
            return replace(state, calm_s=now)
        if now - state.calm_s >= CALM_SECONDS and state.rung:
            return replace(state, rung=0, since_s=now)
        return state
    begun = replace(state, since_s=now, need=wanted.missing, held=held)
    if state.calm_s <= now or not state.need:
        # Begins, or begins again: a rung that is held on to is given its time anew.
        state = replace(begun, calm_s=math.inf)
    rung = state.rung
    if now - state.since_s >= RUNG_SECONDS:
        brought = max(state.need - wanted.missing, state.held - held)
        rung += wanted.short and brought < state.need * _RUNG_WORTH_IT
        state = begun
    elif wanted.short and not able and rung >= URGENT_RUNG:
        # On those below, who has nothing now may have something in a moment.
        rung += 1
    if wanted.urgent:
        rung = max(rung, URGENT_RUNG)
    rung = min(rung, wanted.highest)
    return state if rung == state.rung else replace(begun, rung=rung, calm_s=math.inf)


def may_give(facts: Facts, rung: int, empty: Empty, *, short: bool) -> bool:
    """Whether a VM can be asked for pages on a rung.

    :param empty: what it was asked for in vain.
    :param short: the guest is short itself; that counts below the urgent rungs.
    """
    sample = facts.sample
    if facts.config.mode not in _MODES or sample.refused:
        return False
    if sample.condition not in (Condition.RUNNING, Condition.PAUSED):
        return False
    if pacing.spared(facts.spare, sampled=rung < URGENT_RUNG) <= 0:
        return False
    if rung <= empty.rung and not _another(facts, rung, empty):
        return False
    return bool(states_of(facts, rung)) and not (short and rung < URGENT_RUNG)


def _another(facts: Facts, rung: int, empty: Empty) -> bool:
    """Whether a VM that gave nothing is another one by now: it has something new, or time has passed."""
    if facts.resident >= empty.resident + pacing.step_most(facts.sample) // _GROWN_PARTS:
        return True
    return facts.now - empty.at_s >= (EMPTY_SECONDS if rung < URGENT_RUNG else EMPTY_HARD_SECONDS)


def states_of(facts: Facts, rung: int) -> tuple[ReclaimState, ...]:
    """What is tried with a VM on a rung: free pages only where its agent can confirm them."""
    states, _ = RUNGS[min(rung, len(RUNGS) - 1)]
    asked = states if rung >= URGENT_RUNG else [each for each in states if each in facts.config.states]
    confirmed = facts.sample.guest_connected and facts.sample.condition is Condition.RUNNING
    if rung >= URGENT_RUNG:
        # Two more scans of a guest take seconds where everybody is busy: worth it for some pages only.
        confirmed = confirmed and facts.unused >= pacing.step_least(facts.sample)
    return tuple(each for each in asked if confirmed or each is not ReclaimState.UNUSED)


def steps(givers: Sequence[Giver], wanted: Need, rung: int, held: int) -> list[Step]:
    """The steps of one round.

    :param givers: all who may give, also those who have to be waited for: what falls to them is not taken from others.
    :param held: bytes of backing and store of all VMs.
    """
    share = _ROUND_SHARE if rung < URGENT_RUNG else _ROUND_SHARE_URGENT
    most = max(_ROUND_LEAST, int(held * share)) >> PAGE_SHIFT
    missing = min(wanted.missing >> PAGE_SHIFT, most) - sum(each.ordered for each in givers)
    if missing <= 0:
        return []
    _, sampled = RUNGS[min(rung, len(RUNGS) - 1)]
    pieces = _PIECES_URGENT if wanted.urgent else sharing.PIECES
    shares = sharing.taken([_holder(each, sampled=sampled) for each in givers], missing, pieces)
    purpose = Purpose.PRESSURE if rung < URGENT_RUNG else Purpose.EMERGENCY
    return [
        Step(each.name, states_of(each.facts, rung), shares[each.name], sampled, purpose, wanted.reason)
        for each in givers
        if each.ready and each.name in shares
    ]


def _holder(giver: Giver, *, sampled: bool) -> sharing.Holder:
    facts, sample = giver.facts, giver.facts.sample
    # A guest that stands still uses nothing.
    used = (
        0
        if sample.condition is Condition.PAUSED
        else int(facts.resident if facts.working_set is None else facts.working_set)
    )
    size = (sample.backing_bytes + sample.store_bytes) >> PAGE_SHIFT
    left = max(0, pacing.spared(facts.spare, sampled=sampled) - giver.ordered)
    most = min(left, pacing.step_most(sample))
    return sharing.Holder(giver.name, facts.config.shares, max(0, size - giver.ordered), used, most)
