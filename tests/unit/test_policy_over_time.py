"""Policy over time, on a model of guests and a host (tests/policy/model.py): what no single decision shows."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hva_host.policy import pacing
from hva_host.policy.decisions import Complaint, Phase, Purpose
from hva_host.policy.rates import WINDOW_SECONDS
from hva_host.policy.samples import Condition, Limits
from hva_host.policy.shortage import available_least
from hvaqemu.pages import PAGE_SHIFT
from hvaqemu.reclaim_config import ReclaimState
from hvaqemu.units import GiB, MiB
from tests.policy.curves import turns
from tests.policy.model import Group, Guest, Host, Moment, phased, play, typical
from tests.unit.policy_samples import config, limits

UNUSED, VOLATILE, POTENTIAL, STABLE = ReclaimState
HOUR = 3600.0


def proactive(guests: Iterable[Guest], **keys: Any) -> Limits:
    return limits({guest.name: config(mode="proactive", **keys) for guest in guests})


def backing(moment: Moment) -> int:
    return moment.look.vms[0].backing_bytes


def exceeding(moments: list[Moment]) -> list[float]:
    """How long each time that the rate was above its budget lasted, in seconds."""
    found, since = [], None
    for moment in moments:
        view = moment.decisions.views[0]
        above = view.refault_rate is not None and view.budget is not None and view.refault_rate > view.budget
        if above and since is None:
            since = moment.now
        elif not above and since is not None:
            found.append(moment.now - since)
            since = None
    return found


def still(seed: int = 0) -> Guest:
    """A guest that uses 100 MiB of its own, and once read 200 MiB of files."""
    mib = MiB >> PAGE_SHIFT
    groups = [Group(UNUSED, 200 * mib, 0.0), Group(VOLATILE, 200 * mib, 0.0), Group(STABLE, 100 * mib, 20.0)]
    return Guest("a", groups, seed=seed)


def test_a_still_guest_comes_down_to_what_it_uses_and_is_left_in_peace() -> None:
    guest = still()
    moments = list(play([guest], proactive([guest]), HOUR))
    assert guest.backing <= 104 * MiB
    assert guest.refaults == 0
    # Once it is down, one scan a minute and a smallest step every five are all that it costs.
    late = [moment for moment in moments if moment.now > 0.75 * HOUR]
    resting = [moment for moment in late if moment.decisions.views[0].phase is Phase.RESTING]
    assert len(resting) > 0.8 * len(late)
    steps = [step for moment in late for step in moment.decisions.steps]
    assert len(steps) <= 4
    assert max(step.pages for step in steps) <= 32
    assert sum(len(moment.decisions.scans) for moment in late) <= 16
    assert all(later.now - now.now >= 1.0 for now, later in itertools.pairwise(late))


@pytest.mark.parametrize("seed", range(3))
def test_scans_never_take_more_than_their_share_of_the_guest(seed: int) -> None:
    guest = typical("a", seed)
    seconds = 1800.0
    list(play([guest], proactive([guest]), seconds))
    assert guest.scans * 0.043 <= pacing.GUEST_SHARE_STEPPING * seconds + 3 * 0.043


def test_a_guest_that_changes_is_followed_without_oscillation() -> None:
    guest, change, begins = phased()
    moments = list(play([guest], proactive([guest], refault_budget="1%/min"), begins[-1], each=change))
    used = 212 * MiB
    ends = [max((m for m in moments if m.now < end), key=lambda m: m.now) for end in begins]
    # 160 MiB used, and 52 MiB that no copy exists of, in the phases that are long enough.
    assert [backing(ends[place]) for place in (0, 3)] == pytest.approx([used, used], rel=0.05)
    assert backing(ends[1]) <= used + 60 * MiB
    # Each phase may take memory back once and lose it once.
    assert turns([backing(moment) for moment in moments], 16 * MiB) <= 2 * len(begins)


rates = st.sampled_from([0.0, 0.0, 0.01, 0.1, 1.0, 20.0])
groups = st.lists(
    st.builds(Group, st.sampled_from(ReclaimState), st.integers(256, 40_000), rates), min_size=1, max_size=5
)


@settings(max_examples=15, suppress_health_check=[HealthCheck.too_slow])
@given(groups, st.integers(0, 1000), st.sampled_from(["0.2%/min", "1%/min"]))
def test_whatever_a_guest_is_like_the_budget_is_kept_and_steps_are_bounded(
    pages: list[Group], seed: int, allowed: str
) -> None:
    guest = Guest("a", pages, seed=seed)
    states = [str(state) for state in ReclaimState]
    moments = list(play([guest], proactive([guest], refault_budget=allowed, states=states), 1200))
    paused = False
    for moment in moments:
        view = moment.decisions.views[0]
        above = view.refault_rate is not None and view.budget is not None and view.refault_rate > view.budget
        # Beyond the budget nothing more goes, in that very look, until the rate is at half of it.
        paused = above or (paused and (view.refault_rate or 0) > (view.budget or 0) / 2)
        for step in moment.decisions.steps:
            assert not paused
            assert step.sampled
            assert step.pages <= pacing.step_most(moment.look.vms[0])
            assert moment.look.vms[0].backing_bytes > 64 * MiB
    # What goes on by itself ends with the window. (Pages that had gone before may still be wanted one by one.)
    if all(group.rate in (0.0, 20.0) for group in pages):
        longest = max(exceeding(moments), default=0.0)
        assert longest <= WINDOW_SECONDS + 2 * pacing.INTERVAL_MOST


@settings(max_examples=20, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_nothing_is_decided_about_a_vm_that_can_not_be_seen(data: st.DataObject) -> None:
    """It is silent, HELD, away or refused at times; then, and only then, nothing is done with it."""
    guest, busy = still(1), still(2)
    busy.name = "b"
    modes = data.draw(st.tuples(*[st.sampled_from(["proactive", "pressure", "off", "manual"])] * 2))
    allowed = Limits({name: config(mode=mode) for name, mode in zip("ab", modes, strict=True)}, available_bytes=GiB)
    host = Host(2 * GiB)

    def change(_now: float) -> None:
        guest.silent = data.draw(st.booleans())
        guest.condition = data.draw(st.sampled_from([Condition.RUNNING, Condition.HELD, Condition.AWAY]))
        host.others = data.draw(st.sampled_from([0, GiB, 2 * GiB]))

    for moment in play([guest, busy], allowed, 40.0, host, change):
        seen = {vm.name for vm in moment.look.vms if vm.condition is Condition.RUNNING}
        active = {name for name, mode in zip("ab", modes, strict=True) if mode in ("proactive", "pressure")}
        decisions = moment.decisions
        asked = [step.vm for step in decisions.steps] + [scan.vm for scan in decisions.scans]
        assert set(asked + [each.vm for each in decisions.balloons]) <= seen & active


def test_a_target_is_reached_and_held() -> None:
    guest = typical("a", 3)
    moments = list(play([guest], limits({"a": config(mode="target", target="200M")}), 1800))
    sizes = [backing(moment) for moment in moments if moment.now > 600]
    assert max(sizes) <= 200 * MiB + 200 * MiB // 32 + MiB
    assert not [warn for moment in moments for warn in moment.decisions.warnings]
    assert turns(sizes, 8 * MiB) <= 2


def test_a_target_below_what_a_guest_uses_is_given_up_loudly() -> None:
    guest = typical("a", 3)
    moments = list(play([guest], limits({"a": config(mode="target", target="80M")}), 1800))
    warnings = [(moment.now, warn) for moment in moments for warn in moment.decisions.warnings]
    assert {warn.complaint for _, warn in warnings} == {Complaint.TARGET_MISSED}
    assert guest.backing > 80 * MiB
    # It is not pushed all the time for nothing.
    steps = [moment.now for moment in moments if moment.decisions.steps and moment.now > 900]
    assert len(steps) <= 12


def fleet(count: int = 8, **keys: Any) -> tuple[list[Guest], Limits]:
    guests = [typical(f"vm-{number}", number, busy=0.5 if number % 2 else 4) for number in range(count)]
    return guests, limits({guest.name: config(mode="pressure", **keys) for guest in guests})


def test_a_short_host_soon_has_enough_and_no_more_is_taken() -> None:
    guests, allowed = fleet()
    host = Host(8 * GiB, others=int(4.1 * GiB))
    moments = list(play(guests, allowed, 300.0, host))
    assert moments[0].look.host is not None
    assert moments[0].look.host.available_bytes == 0
    last = moments[-1].look.host
    assert last is not None
    assert last.available_bytes >= 400 * MiB
    # Enough is enough: a margin, and not whatever can be had.
    assert last.available_bytes <= 800 * MiB
    assert not [warn for moment in moments for warn in moment.decisions.warnings]


def test_min_resident_is_left_in_an_emergency() -> None:
    guests, allowed = fleet(min_resident="300M")
    host = Host(8 * GiB, others=8 * GiB)
    for moment in play(guests, replace(allowed, balloon=False), 200.0, host):
        for vm in moment.look.vms:
            # What is ordered leaves it; the last region of a step may go beyond by what it holds.
            assert vm.backing_bytes >= 300 * MiB - 2 * MiB


def test_shares_are_a_claim() -> None:
    guests, allowed = fleet()
    precious = config(mode="pressure", shares=400)
    # No emergency: that takes what can be had.
    allowed = replace(allowed, reclaim={**allowed.reclaim, "vm-1": precious}, available_bytes=int(1.2 * GiB))
    list(play(guests, allowed, 300.0, Host(8 * GiB, others=int(3.3 * GiB))))
    left = {guest.name: guest.backing for guest in guests}
    assert left["vm-1"] > 1.2 * max(left[name] for name in ("vm-3", "vm-5", "vm-7"))


def test_when_nothing_is_left_balloons_are_used_and_given_back_with_the_memory() -> None:
    guests, allowed = fleet()
    host = Host(8 * GiB, others=4 * GiB)

    def change(now: float) -> None:
        host.others = (8 if now < 200 else 2) * GiB

    moments = list(play(guests, allowed, 500.0, host, change))
    ballooned = [each for moment in moments if moment.now < 200 for each in moment.decisions.balloons]
    assert ballooned
    assert min(each.guest_bytes for each in ballooned) >= 128 * MiB
    warnings = [warn.complaint for moment in moments if moment.now < 200 for warn in moment.decisions.warnings]
    assert Complaint.NOTHING_LEFT in warnings
    assert all(guest.balloon == guest.memory for guest in guests)
    # Back only after a while without pressure, and never again taken for it.
    back = [moment.now for moment in moments if moment.now >= 200 and moment.decisions.balloons]
    assert back[0] >= 230


def test_memory_that_goes_fast_is_made_up_for_before_it_is_gone() -> None:
    guests, allowed = fleet()
    host = Host(8 * GiB, others=GiB)

    def change(now: float) -> None:
        host.others = GiB + int(min(now, 20.0) * 150 * MiB)

    moments = list(play(guests, allowed, 90.0, host, change))
    looks = [moment.look.host for moment in moments]
    # Without looking ahead a quarter of that.
    assert min(each.available_bytes for each in looks if each is not None) >= available_least(8 * GiB)
    assert not [warn for moment in moments for warn in moment.decisions.warnings]


def test_a_round_never_takes_more_than_its_bound() -> None:
    guests, allowed = fleet(16)
    host = Host(16 * GiB, others=16 * GiB)
    for moment in play(guests, allowed, 120.0, host):
        held = sum(vm.backing_bytes + vm.store_bytes for vm in moment.look.vms)
        ordered = sum(step.pages for step in moment.decisions.steps) << PAGE_SHIFT
        emergency = any(step.purpose is Purpose.EMERGENCY for step in moment.decisions.steps)
        assert ordered <= max(64 * MiB, held // (8 if emergency else 16))
