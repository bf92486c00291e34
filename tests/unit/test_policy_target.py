"""Mode target, one decision at a time."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hva_host.policy import pacing
from hva_host.policy.decisions import Complaint, Phase
from hva_host.policy.samples import VmSample
from hva_host.policy.state import TargetState
from hva_host.policy.target import AGAIN_LEAST, AGAIN_MOST, BAND_LEAST, band, decide
from hvaqemu.reclaim_config import ReclaimConfig, ReclaimState
from hvaqemu.units import MiB
from tests.unit.policy_samples import MEG, VM, config, facts

UNUSED, VOLATILE, POTENTIAL, STABLE = ReclaimState
AIM = config(mode="target", target="200M")


def vm(backing: int, store: int = 0) -> VmSample:
    return replace(VM, backing_bytes=backing, store_bytes=store)


def test_a_step_is_as_large_as_what_is_too_much() -> None:
    verdict = decide(TargetState(), facts(vm(210 * MiB), config=AIM))
    assert verdict.step is not None
    assert (verdict.step.pages, verdict.step.states, verdict.step.sampled) == (10 * MEG, (UNUSED,), True)
    assert verdict.state.active


def test_the_store_counts_too() -> None:
    assert decide(TargetState(), facts(vm(150 * MiB, 60 * MiB), config=AIM)).step is not None


def test_between_target_and_band_it_goes_on_but_does_not_begin() -> None:
    assert band(200 * MiB) == 6.25 * MiB
    assert band(8 * MiB) == BAND_LEAST
    look = facts(vm(205 * MiB), config=AIM)
    assert decide(TargetState(), look).step is None
    assert decide(TargetState(active=True), look).step is not None
    verdict = decide(TargetState(active=True, rung=2, before=300 * MiB), facts(vm(200 * MiB), config=AIM))
    assert (verdict.step, verdict.phase, verdict.state) == (None, Phase.RESTING, TargetState())


def after(state: TargetState, size: int, now: float, aim: ReclaimConfig = AIM) -> TargetState:
    return decide(state, facts(vm(size), now, config=aim)).state


def test_a_rung_that_brings_little_is_left() -> None:
    aim = config(mode="target", target="100M", states=["stable", "unused", "volatile"])
    state, tried, now = TargetState(), [], 100.0
    for _ in range(5):
        verdict = decide(state, facts(vm(300 * MiB), now, config=aim))
        assert verdict.step is not None
        tried.append((verdict.step.states, verdict.step.sampled))
        state, now = verdict.state, now + 30
    cold = [((UNUSED,), True), ((UNUSED, VOLATILE), True), ((UNUSED, VOLATILE, STABLE), True)]
    assert tried == [*cold, ((UNUSED, VOLATILE), False), ((UNUSED, VOLATILE, STABLE), False)]


def test_a_rung_that_brings_something_is_kept() -> None:
    state = after(TargetState(), 300 * MiB, 100.0)
    assert after(state, 290 * MiB, 130.0).rung == 0
    assert after(state, 300 * MiB, 130.0).rung == 1


def test_pages_in_use_are_taken_only_if_half_of_them_stay_away() -> None:
    hard = TargetState(active=True, rung=2, before=300 * MiB, asked=60 * MEG)
    assert after(hard, 269 * MiB, 130.0).rung == 2
    assert after(hard, 271 * MiB, 130.0).until_s == 130 + AGAIN_LEAST


def test_what_can_not_be_reached_is_said_and_tried_again_ever_less_often() -> None:
    state, now, waits = TargetState(), 100.0, []
    for _ in range(60):
        verdict = decide(state, facts(vm(300 * MiB), now, config=AIM))
        if verdict.warn is not None:
            assert verdict.step is None
            assert (verdict.warn.complaint, verdict.warn.missing_bytes) == (Complaint.TARGET_MISSED, 100 * MiB)
            waits.append(verdict.state.until_s - now)
            now = verdict.state.until_s
        state, now = verdict.state, now + 30
    assert waits[:3] == [60, 120, 240]
    assert max(waits) == AGAIN_MOST


@pytest.mark.parametrize("spare", [0, 10])
def test_min_resident_is_left(spare: int) -> None:
    verdict = decide(TargetState(), facts(vm(300 * MiB), config=AIM, spare=spare))
    assert verdict.step is None
    assert verdict.warn is not None


def test_no_step_goes_below_min_resident() -> None:
    verdict = decide(TargetState(), facts(vm(300 * MiB), config=AIM, spare=1000))
    assert verdict.step is not None
    assert verdict.step.pages == 1000


def test_free_pages_are_not_asked_for_without_the_agent() -> None:
    verdict = decide(TargetState(), facts(replace(vm(300 * MiB), guest_connected=False), config=AIM))
    assert verdict.step is not None
    assert verdict.step.states == (VOLATILE,)


@given(st.integers(0, 512 * MiB), st.integers(0, 128 * MiB), st.integers(0, 10), st.integers(0, 1 << 17), st.booleans())
def test_steps_are_bounded(backing: int, store: int, rung: int, spare: int, active: bool) -> None:
    sample = vm(backing, store)
    step = decide(TargetState(active, rung), facts(sample, config=AIM, spare=spare)).step
    if step is not None:
        assert 1 <= step.pages <= min(spare, pacing.step_most(sample))
        assert backing + store > 200 * MiB
