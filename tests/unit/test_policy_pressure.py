"""The host is short: how much is missing, how hard is tried, and who gives."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hva_host.policy import pacing
from hva_host.policy.balloon import LEAST, deflated, inflated
from hva_host.policy.decisions import Purpose
from hva_host.policy.pressure import CALM_SECONDS, RUNG_SECONDS, Giver, climbed, may_give, states_of, steps
from hva_host.policy.rungs import BALLOON_RUNG, URGENT_RUNG
from hva_host.policy.samples import Cgroup, Condition, GuestWord, HostSample, Limits, Look
from hva_host.policy.shortage import Need, available_least, need
from hva_host.policy.state import Empty, HostMemory
from hvaqemu.pages import PAGE_SHIFT
from hvaqemu.reclaim_config import ReclaimState
from hvaqemu.units import GiB, MiB, TiB
from tests.unit.policy_samples import HOST, MEG, VM, config, facts

UNUSED, VOLATILE, POTENTIAL, STABLE = ReclaimState
PLENTY = Limits(available_bytes=GiB)


def missing(host: HostSample = HOST, allowed: Limits = PLENTY, *, pressed: bool = False) -> Need:
    return need(Look(host, (VM,)), host, allowed, pressed=pressed)


def test_what_is_kept_available_by_default() -> None:
    assert available_least(GiB) == int(0.06 * GiB)
    assert available_least(8 * GiB) == pytest.approx(0.4 * GiB, abs=2)
    assert available_least(TiB) == pytest.approx(10.84 * GiB, rel=0.001)


def test_nothing_is_missing() -> None:
    assert missing() == Need()


def test_available_memory() -> None:
    found = missing(replace(HOST, available_bytes=900 * MiB))
    assert (found.missing, found.urgent, found.short) == (124 * MiB, False, True)
    assert missing(replace(HOST, available_bytes=500 * MiB)).urgent
    assert "the host has 900.0 MiB available" in found.reason


def test_once_something_is_missing_a_little_more_is_made_available() -> None:
    host = replace(HOST, available_bytes=GiB)
    assert missing(host).missing == 0
    found = missing(host, pressed=True)
    assert (found.missing, found.short) == (256 * MiB, False)


def test_a_cgroup() -> None:
    host = replace(HOST, cgroup=Cgroup(limit_bytes=10 * GiB, usage_bytes=10 * GiB - 300 * MiB))
    found = missing(host)
    assert (found.missing, found.urgent) == (212 * MiB, False)
    assert missing(replace(host, cgroup=Cgroup(10 * GiB, 10 * GiB))).urgent


def test_the_budget_counts_backing_and_store_and_needs_no_host() -> None:
    vm = replace(VM, store_bytes=100 * MiB)
    found = need(Look(None, (vm, vm)), None, Limits(budget_bytes=960 * MiB), pressed=False)
    assert (found.missing, found.urgent, found.highest) == (40 * MiB, False, BALLOON_RUNG - 1)
    found = need(Look(None, (vm, vm)), None, Limits(budget_bytes=500 * MiB), pressed=False)
    assert (found.missing, found.urgent, found.highest) == (500 * MiB, True, BALLOON_RUNG)


def test_waiting_alone_takes_only_what_is_cold() -> None:
    some = missing(replace(HOST, psi_some=0.11, psi_full=0.02))
    assert (some.missing, some.urgent, some.highest) == (VM.backing_bytes // 64, False, 1)
    assert missing(replace(HOST, psi_some=0.5, psi_full=0.2)).highest == 3
    assert missing(replace(HOST, psi_some=0.1)) == Need()
    assert missing(replace(HOST, psi_some=None, psi_full=None)) == Need()


SHORT = Need(100 * MiB, False, "short", BALLOON_RUNG, True)


def climb(state: HostMemory, wanted: Need, *held_at: tuple[float, int], able: bool = True) -> HostMemory:
    for now, held in held_at:
        state = climbed(state, wanted, held, now, able=able)
    return state


def test_a_rung_that_brings_something_is_kept() -> None:
    state = climb(HostMemory(), SHORT, (0, 1000 * MiB), (RUNG_SECONDS, 974 * MiB))
    assert state.rung == 0
    assert climb(state, SHORT, (2 * RUNG_SECONDS, 950 * MiB)).rung == 1


def test_in_an_emergency_the_next_rung_is_tried_as_soon_as_nobody_has_anything() -> None:
    urgent = replace(SHORT, urgent=True)
    assert climb(HostMemory(), urgent, (0, 0), (1, 0), (2, 0), able=False).rung == URGENT_RUNG + 2
    # Below, who has nothing now may have something once its samples were watched.
    assert climb(HostMemory(), SHORT, (0, 0), (1, 0), (2, 0), able=False).rung == 0


def test_in_an_emergency_the_first_rungs_are_left_out() -> None:
    assert climb(HostMemory(), replace(SHORT, urgent=True), (0, 0)).rung == URGENT_RUNG


def test_no_rung_is_above_what_it_is_worth() -> None:
    looks = [(float(now), 0) for now in range(60)]
    assert climb(HostMemory(), replace(SHORT, highest=1), *looks, able=False).rung == 1
    assert climb(HostMemory(), SHORT, *looks, able=False).rung == BALLOON_RUNG
    assert climb(HostMemory(), replace(SHORT, short=False), *looks, able=False).rung == 0


def test_the_ladder_is_left_only_after_a_while() -> None:
    state = climb(HostMemory(), replace(SHORT, urgent=True), (0, 0), (1, 0))
    state = climb(state, Need(), (2, 0), (1 + CALM_SECONDS, 0))
    assert state.rung == URGENT_RUNG
    assert climb(state, Need(), (2 + CALM_SECONDS, 0)).rung == 0
    # And a shortage in between begins the while anew.
    state = climb(climb(state, SHORT, (20, 0)), Need(), (21, 0), (2 + CALM_SECONDS, 0))
    assert state.rung >= 2
    assert math.isfinite(state.calm_s)


@pytest.mark.parametrize(
    ("change", "rung", "gives"),
    [
        ({"config": config(mode="pressure")}, 0, True),
        ({"config": config(mode="target", target="100M")}, 0, True),
        ({"config": config(mode="manual")}, BALLOON_RUNG, False),
        ({"config": config(mode="off")}, BALLOON_RUNG, False),
        ({"spare": 0}, BALLOON_RUNG, False),
        ({"sample": replace(VM, condition=Condition.HELD)}, BALLOON_RUNG, False),
        ({"sample": replace(VM, condition=Condition.AWAY)}, BALLOON_RUNG, False),
        ({"sample": replace(VM, refused="a migration")}, BALLOON_RUNG, False),
        ({"sample": replace(VM, condition=Condition.PAUSED)}, 0, False),
        ({"sample": replace(VM, condition=Condition.PAUSED)}, 1, True),
        ({"sample": replace(VM, guest_connected=False)}, 0, False),
        ({"config": config(mode="pressure", states=["stable"])}, 1, False),
        ({"config": config(mode="pressure", states=["stable"])}, URGENT_RUNG, True),
    ],
)
def test_who_is_asked(change: dict[str, Any], rung: int, gives: bool) -> None:
    assert may_give(facts(**change), rung, Empty(), short=False) is gives


def test_a_guest_that_is_short_itself_is_asked_only_in_an_emergency() -> None:
    assert not may_give(facts(), URGENT_RUNG - 1, Empty(), short=True)
    assert may_give(facts(), URGENT_RUNG, Empty(), short=True)


#: Pages.
RESIDENT = facts().resident


def test_a_vm_that_gave_nothing_is_not_asked_there_for_a_while() -> None:
    assert not may_give(facts(), 2, Empty(2, 50.0, RESIDENT), short=False)
    assert not may_give(facts(), 1, Empty(2, 95.0, RESIDENT), short=False)
    assert may_give(facts(), 1, Empty(2, 50.0, RESIDENT), short=False)
    assert may_give(facts(), 3, Empty(2, 50.0, RESIDENT), short=False)
    assert may_give(facts(now=111.0), 2, Empty(2, 50.0, RESIDENT), short=False)


def test_a_vm_that_gave_nothing_is_asked_again_once_it_has_got_something_new() -> None:
    assert not may_give(facts(resident=RESIDENT + 15 * MEG), 2, Empty(2, 95.0, RESIDENT), short=False)
    assert may_give(facts(resident=RESIDENT + 16 * MEG), 2, Empty(2, 95.0, RESIDENT), short=False)


def test_in_an_emergency_few_give_much() -> None:
    all_of_them = [giver(str(place)) for place in range(12)]
    gentle = steps(all_of_them, replace(SHORT, missing=64 * MiB), 1, 4800 * MiB)
    hasty = steps(all_of_them, replace(SHORT, missing=64 * MiB, urgent=True), URGENT_RUNG, 4800 * MiB)
    assert (len(gentle), len(hasty)) == (12, 4)
    assert sum(step.pages for step in gentle) == sum(step.pages for step in hasty) == 64 * MEG


def test_users_states_bind_until_it_is_an_emergency() -> None:
    only = facts(config=config(mode="pressure", states=["unused"]))
    assert states_of(only, 1) == (UNUSED,)
    assert states_of(only, URGENT_RUNG) == (VOLATILE,)
    free = replace(only, unused=1000)
    assert states_of(free, URGENT_RUNG) == (UNUSED, VOLATILE)
    assert states_of(free, BALLOON_RUNG) == (UNUSED, VOLATILE, POTENTIAL, STABLE)


def giver(name: str, *, ready: bool = True, ordered: int = 0, **changes: Any) -> Giver:
    return Giver(facts(replace(VM, name=name), **changes), ready, ordered)


def test_steps_take_from_the_idle_what_is_missing() -> None:
    found = steps([giver("busy"), giver("idle", working_set=1000.0)], replace(SHORT, missing=20 * MiB), 0, 800 * MiB)
    assert [(step.vm, step.pages, step.purpose) for step in found] == [("idle", 20 << 8, Purpose.PRESSURE)]


def test_what_is_under_way_is_counted() -> None:
    assert steps([giver("a"), giver("b", ordered=SHORT.missing >> PAGE_SHIFT)], SHORT, 0, 800 * MiB) == []


def test_what_falls_to_a_vm_that_is_waited_for_is_not_taken_from_others() -> None:
    idle, busy = giver("idle", ready=False, working_set=1000.0), giver("busy")
    assert steps([idle, busy], replace(SHORT, missing=20 * MiB), 0, 800 * MiB) == []


@given(st.integers(1, 200), st.integers(0, 1 << 42), st.integers(0, BALLOON_RUNG))
def test_a_round_is_bounded(vms: int, lacking: int, rung: int) -> None:
    """By 64 MiB or a sixteenth of what all VMs hold, an eighth in an emergency, whatever the host is missing."""
    held = vms * VM.backing_bytes
    found = steps([giver(str(place)) for place in range(vms)], replace(SHORT, missing=lacking), rung, held)
    assert sum(step.pages for step in found) << PAGE_SHIFT <= max(64 * MiB, held // (16 if rung < URGENT_RUNG else 8))
    assert all(1 <= step.pages <= pacing.step_most(VM) for step in found)


WORD = GuestWord(0.0, 512 * MiB, 400 * MiB)


def test_balloons_take_from_those_with_most_to_spare_in_pieces() -> None:
    rich = facts(replace(VM, name="rich", guest=WORD))
    poor = facts(replace(VM, name="poor", guest=replace(WORD, available_bytes=100 * MiB)))
    found = inflated([poor, rich], SHORT)
    assert [(each.vm, each.guest_bytes) for each in found] == [("rich", 448 * MiB), ("poor", 512 * MiB - 36 * MiB)]


@pytest.mark.parametrize(
    "change",
    [
        {"guest": None},
        {"guest": replace(WORD, age_s=60.0)},
        {"guest": replace(WORD, available_bytes=40 * MiB)},
        {"balloon_bytes": None},
        {"balloon_bytes": 130 * MiB},
        {"condition": Condition.PAUSED},
    ],
)
def test_balloons_that_can_not_be_inflated(change: dict[str, Any]) -> None:
    assert inflated([facts(replace(replace(VM, guest=WORD), **change))], SHORT) == []


def test_what_was_taken_is_given_back_in_pieces_and_nothing_else() -> None:
    small = facts(replace(VM, balloon_bytes=256 * MiB, ballooned_bytes=100 * MiB))
    found = deflated([small], HOST, PLENTY, 0)
    assert [(each.guest_bytes, each.taken_bytes) for each in found] == [(320 * MiB, 36 * MiB)]
    little = facts(replace(VM, balloon_bytes=256 * MiB, ballooned_bytes=3 * MiB))
    found = deflated([little], HOST, PLENTY, 0)
    assert [(each.guest_bytes, each.taken_bytes) for each in found] == [(259 * MiB, 0)]


def test_nothing_is_given_back_that_would_be_missing_again() -> None:
    small = [facts(replace(VM, balloon_bytes=256 * MiB, ballooned_bytes=256 * MiB))]
    assert deflated(small, replace(HOST, available_bytes=int(1.4 * GiB)), PLENTY, 0) == []
    assert deflated(small, None, PLENTY, 0) == []
    assert deflated(small, HOST, replace(PLENTY, budget_bytes=GiB), GiB - 10 * MiB) == []
    full = replace(HOST, cgroup=Cgroup(4 * GiB, 4 * GiB - 290 * MiB))
    assert deflated(small, full, PLENTY, 0) == []
    emptier = replace(HOST, cgroup=Cgroup(4 * GiB, 4 * GiB - 310 * MiB))
    assert [each.guest_bytes for each in deflated(small, emptier, PLENTY, 0)] == [320 * MiB]
    # No more than there is beyond what is to be kept.
    three = small * 3
    assert len(deflated(three, emptier, PLENTY, 0)) == 1


@given(st.integers(0, 512 * MiB), st.integers(0, 512 * MiB), st.integers(1, 1 << 40))
def test_a_balloon_leaves_the_guest_what_it_needs(available: int, balloon: int, lacking: int) -> None:
    look = facts(replace(VM, guest=replace(WORD, available_bytes=available), balloon_bytes=balloon))
    for each in inflated([look], replace(SHORT, missing=lacking)):
        taken = balloon - each.guest_bytes
        assert LEAST <= taken <= 64 * MiB
        assert each.guest_bytes >= 128 * MiB
        assert available - taken >= 2 * int(0.05 * 512 * MiB)
