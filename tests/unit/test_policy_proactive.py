"""Mode proactive, one decision at a time. How it goes over time: test_policy_over_time.py."""

from __future__ import annotations

import math
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from hva_host.pager.coldness import REGION
from hva_host.policy import pacing
from hva_host.policy.decisions import Phase
from hva_host.policy.proactive import BUDGET_LEAST, PAUSE_LEAST, PAUSE_MOST, RESAMPLE_SECONDS, budget, decide
from hva_host.policy.rates import WINDOW_SECONDS
from hva_host.policy.samples import Report
from hva_host.policy.state import FIRST_FREE, Facts, Gait, ProactiveState, Rest
from hva_host.policy.verdict import Verdict
from hvaqemu.reclaim_config import ReclaimState
from tests.unit.policy_samples import MEG, VM, config, facts, outcome, refaulted

UNUSED, VOLATILE, POTENTIAL, STABLE = ReclaimState
FRESH = ProactiveState()
#: Its budget is 200 refaults a minute, and half of that less what a sample may add.
LIMIT = 200.0
FEWEST = 68


def size(verdict: Verdict[ProactiveState]) -> int:
    assert verdict.step is not None
    return verdict.step.pages


def test_the_budget_is_a_share_of_the_working_set() -> None:
    assert budget(0.002, 100_000) == 200
    assert budget(0.002, 100) == BUDGET_LEAST
    assert budget(0.002, None) is None


def test_nothing_is_done_while_rate_or_working_set_are_not_known() -> None:
    for blind in (facts(rate=None), facts(working_set=None)):
        verdict = decide(FRESH, blind)
        assert (verdict.phase, verdict.step, verdict.scan) == (Phase.BLIND, None, None)


def test_the_first_step_could_come_back_as_a_whole() -> None:
    assert size(decide(FRESH, facts())) == FEWEST
    assert size(decide(FRESH, facts(rate=LIMIT / 4))) == FEWEST


def test_steps_grow_by_half_while_little_comes_back() -> None:
    gait = Gait(step=1000, went=10_000, back=0)
    verdict = decide(ProactiveState(content=gait), facts())
    assert size(verdict) == 1000
    assert verdict.phase is Phase.GROWING
    assert verdict.state.content.step == 1500


def test_no_step_is_larger_than_the_budget_has_room_for() -> None:
    """Three quarters of it, if of a hundred pages ten come back as they did before."""
    gait = Gait(step=100_000, went=10_000, back=1000)
    assert size(decide(ProactiveState(content=gait), facts(rate=50))) == (150 - 50) / 0.1


def test_near_the_budget_steps_do_not_grow() -> None:
    verdict = decide(ProactiveState(content=Gait(1000, 10_000, 100)), facts(rate=120))
    assert (size(verdict), verdict.phase) == (1000, Phase.HOLDING)
    assert verdict.state.content.step == 1000


def test_near_the_budget_a_step_that_would_exceed_it_waits() -> None:
    verdict = decide(ProactiveState(content=Gait(1000, 10, 10)), facts(rate=140))
    assert (verdict.step, verdict.phase) == (None, Phase.HOLDING)


def test_what_steps_did_is_learned_once_what_was_wanted_is_back() -> None:
    state = decide(FRESH, facts(outcome=outcome(1000), earliest_s=110.0)).state
    assert state.content == FRESH.content
    later = replace(VM, refaults=refaulted(100))
    state = decide(state, facts(later)).state
    assert (state.content.went, state.content.back) == (1000.9, 100.9)


def test_free_pages_go_first_once_they_can_have_been_seen_for_long_enough() -> None:
    verdict = decide(FRESH, facts(unused=10_000))
    assert verdict.step is not None
    assert UNUSED not in verdict.step.states
    later = decide(verdict.state, facts(now=121.0, unused=10_000))
    assert later.step is not None
    assert later.step.states == (UNUSED,)


def test_content_goes_by_the_last_report_while_the_guest_rests_from_it() -> None:
    resting = facts(earliest_s=110.0, unscanned_s=100.0, unused=10_000)
    verdict = decide(replace(FRESH, free_again_s=0.0), resting)
    assert verdict.step is not None
    assert UNUSED not in verdict.step.states
    report = VM.report
    assert report is not None
    old = replace(resting, sample=replace(VM, report=replace(report, age_s=60.0)))
    assert decide(FRESH, old).step is None


def test_a_step_that_gains_little_as_yet_is_not_dull_while_much_is_left_to_be_tried() -> None:
    state = replace(FRESH, done=replace(outcome(40, pages=1000), later=5000))
    verdict = decide(state, facts())
    assert (verdict.state.level, verdict.state.dull) == (0, 0)
    state = replace(FRESH, done=replace(outcome(40, pages=1000), later=200))
    verdict = decide(state, facts(config=config(mode="proactive", states=["volatile", "stable"])))
    assert verdict.state.level == 1


def test_free_pages_go_first_and_in_steps_of_their_own() -> None:
    verdict = decide(replace(FRESH, free_again_s=0.0), facts(unused=10_000))
    assert verdict.step is not None
    assert (verdict.step.states, verdict.step.sampled) == ((UNUSED,), True)
    assert verdict.state.content == FRESH.content
    # Too few are not worth two more scans, and without the agent nobody confirms them.
    for without in (facts(unused=200), facts(replace(VM, guest_connected=False), unused=10_000)):
        verdict = decide(FRESH, without)
        assert verdict.step is not None
        assert verdict.step.states == (VOLATILE,)


def test_where_only_free_pages_are_asked_for_they_are_waited_for() -> None:
    only = config(mode="proactive", states=["unused"])
    verdict = decide(FRESH, facts(config=only, unused=10_000))
    assert (verdict.step, verdict.state.rest) == (None, None)
    assert 100.0 < verdict.next_s <= 130.0
    # A scan has to wait for its share of the guest's processor.
    state = replace(verdict.state, done=outcome(900, pages=1000, states=(UNUSED,)))
    verdict = decide(state, facts(now=130.0, config=only, unused=10_000, earliest_s=134.0, unscanned_s=129.0))
    assert (verdict.step, verdict.state.rest, verdict.next_s) == (None, None, 134.0)
    verdict = decide(verdict.state, facts(now=134.0, config=only, unused=10_000, earliest_s=134.0, unscanned_s=129.0))
    assert verdict.step is not None
    assert verdict.step.states == (UNUSED,)
    # Where there are none it rests.
    verdict = decide(verdict.state, facts(now=140.0, config=only, unused=10))
    assert verdict.state.rest is not None


def test_free_pages_that_are_not_there_are_tried_again_later() -> None:
    state = decide(FRESH, facts(unused=10_000, outcome=outcome(0, states=(UNUSED,)))).state
    verdict = decide(state, facts(unused=10_000, now=101.0))
    assert verdict.step is not None
    assert verdict.step.states == (VOLATILE,)
    verdict = decide(state, facts(unused=10_000, now=170.0))
    assert verdict.step is not None
    assert verdict.step.states == (UNUSED,)


def test_beyond_the_budget_nothing_goes_until_the_rate_is_at_half_of_it() -> None:
    verdict = decide(ProactiveState(content=Gait(4000, 1000, 10)), facts(rate=LIMIT + 1))
    assert (verdict.step, verdict.phase) == (None, Phase.COOLING)
    assert (verdict.next_s, verdict.state.content.step) == (100 + PAUSE_LEAST, 0)
    state = verdict.state
    for now, rate in ((130.0, 0.0), (159.0, 0.0), (161.0, LIMIT * 0.8), (170.0, LIMIT * 0.51)):
        verdict = decide(state, facts(now=now, rate=rate))
        assert (verdict.step, verdict.phase) == (None, Phase.COOLING)
        state = verdict.state
    # It begins again with the fewest.
    assert size(decide(state, facts(now=180.0, rate=LIMIT * 0.5))) == FEWEST


def test_pauses_that_follow_soon_are_longer_and_bounded() -> None:
    state, now, pauses = FRESH, 100.0, []
    for _ in range(8):
        state = decide(state, facts(now=now, rate=LIMIT * 2)).state
        assert state.until_s is not None
        pauses.append(state.until_s - now)
        now = state.until_s
        state = decide(state, facts(now=now, rate=0.0)).state
        now += WINDOW_SECONDS
    assert pauses[:4] == [60, 120, 240, 480]
    assert max(pauses) == PAUSE_MOST
    state = decide(state, facts(now=now + 3600, rate=LIMIT * 2)).state
    assert state.until_s == now + 3600 + PAUSE_LEAST


def test_states_follow_each_other_where_steps_gain_little() -> None:
    everything = config(mode="proactive", states=[STABLE, POTENTIAL, VOLATILE])
    state, tried = FRESH, []
    for _ in range(3):
        verdict = decide(state, facts(config=everything))
        assert verdict.step is not None
        tried.append(verdict.step.states)
        state = decide(verdict.state, facts(config=everything, outcome=outcome(3), earliest_s=110.0)).state
    assert tried == [(VOLATILE,), (VOLATILE, POTENTIAL), (VOLATILE, POTENTIAL, STABLE)]


def rested() -> ProactiveState:
    state, now = FRESH, 100.0
    for _ in range(3):
        state = decide(state, facts(now=now, outcome=outcome(0), earliest_s=0.0)).state
        now += 100
    assert state.rest is not None
    return state


def test_a_guest_that_gives_little_rests() -> None:
    state = rested()
    verdict = decide(state, facts(now=320.0))
    assert (verdict.step, verdict.scan, verdict.phase) == (None, None, Phase.RESTING)
    # Only its totals are asked for, once a minute.
    old = replace(VM, report=replace(VM.report or Report(0, 0, 0, 0, 0), age_s=61.0))
    assert decide(state, facts(old, now=320.0)).scan is not None
    assert decide(state, facts(replace(old, guest_connected=False), now=320.0)).scan is None


def test_where_nothing_changed_one_smallest_step_tells() -> None:
    verdict = decide(rested(), facts(now=300 + RESAMPLE_SECONDS + 1, earliest_s=0.0))
    assert size(verdict) == FEWEST
    now = 300 + RESAMPLE_SECONDS + 100
    assert decide(verdict.state, facts(now=now, outcome=outcome(0), earliest_s=0.0)).state.rest is not None


def test_what_wakes_it() -> None:
    state = rested()
    report = VM.report
    assert report is not None
    for change in (
        facts(now=330.0, resident=100 * MEG + VM.backing_bytes // 4096),
        facts(replace(VM, report=replace(report, volatile=report.volatile + 256)), now=330.0),
        facts(replace(VM, report=replace(report, unused=report.unused + 256)), now=330.0),
        facts(now=300 + RESAMPLE_SECONDS + 1, earliest_s=0.0),
    ):
        assert decide(state, change).step is not None
    # States that may not be discarded do not.
    assert decide(state, facts(replace(VM, report=replace(report, potential=10_000)), now=330.0)).step is None


def test_min_resident_is_left() -> None:
    verdict = decide(FRESH, facts(spare=10))
    assert (verdict.step, verdict.phase) == (None, Phase.RESTING)
    assert size(decide(ProactiveState(content=Gait(5000, 1e9, 0)), facts(spare=777))) == 777 - REGION


gaits = st.builds(
    lambda step, went, share: Gait(step, went, went * share),
    st.integers(0, 1 << 20),
    st.floats(1, 1e6),
    st.floats(0, 1),
)
states = st.builds(
    ProactiveState,
    free=gaits | st.just(FIRST_FREE),
    content=gaits,
    until_s=st.none() | st.floats(0, 1000),
    pause_s=st.floats(60, 600),
    resumed_s=st.floats(0, 100),
    level=st.integers(0, 2),
    dull=st.integers(0, 2),
    rest=st.none() | st.builds(Rest, pages := st.integers(0, 1 << 20), pages, pages, pages, st.floats(0, 1000)),
    done=st.none() | st.builds(outcome, st.integers(0, 1 << 20)),
)
seen = st.builds(
    facts,
    st.builds(
        lambda age, back: replace(VM, report=Report(age, 1, 2, 3, 4), refaults=refaulted(back)),
        st.floats(0, 500),
        st.integers(0, 1 << 30),
    ),
    st.floats(0, 1000),
    rate=st.none() | st.floats(0, 1e6),
    working_set=st.none() | st.floats(0, 1e6),
    unused=st.integers(0, 1 << 17),
    resident=st.integers(0, 1 << 17),
    spare=st.integers(0, 1 << 17),
    earliest_s=st.floats(0, 1000),
)


@given(states, seen)
def test_steps_are_bounded_and_within_the_budget(state: ProactiveState, look: Facts) -> None:
    verdict = decide(state, look)
    step = verdict.step
    assert verdict.state.until_s is None or verdict.state.until_s <= max(1000.0, look.now + PAUSE_MOST)
    assert math.isfinite(verdict.next_s)
    if step is None:
        return
    assert look.rate is not None
    limit = budget(look.config.refault_budget, look.working_set)
    assert limit is not None
    assert look.rate <= limit
    assert look.now >= look.earliest_s
    assert state.until_s is None or (look.now >= state.until_s and look.rate <= limit / 2)
    assert 1 <= step.pages <= min(look.spare, max(pacing.step_most(VM), pacing.step_least(VM)))
    assert step.sampled
    assert set(step.states) <= set(look.config.states)
