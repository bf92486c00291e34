"""Sampling: bounded steps up, one step down to nothing, and rests that end."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from hva_host.pager.coldness import REGION, REST_SECONDS, SHARES, WATCHED_SECONDS, Choice, Coldness

PAGES = 4 * REGION
ALL = np.arange(PAGES)


class Epochs:
    """Epochs over pages that stay away until a test says otherwise."""

    def __init__(self) -> None:
        self.now = 100.0
        self.number = 0
        self.coldness = Coldness(PAGES, seed=1)
        self.away: set[int] = set()

    def run(self, candidates: NDArray[np.int64] = ALL, after: float = WATCHED_SECONDS) -> Choice:
        """An epoch ``after`` seconds later, which pages all of its choice out."""
        self.now += after
        here = np.array([pfn for pfn in candidates.tolist() if pfn not in self.away], dtype=np.int64)
        self.number += 1
        self.coldness.begin(self.now, self.number)
        choice = self.coldness.choose(here)
        assert len(choice.pfns) + choice.later + choice.resting == len(here)
        assert set(choice.pfns.tolist()) <= set(here.tolist())
        assert np.all(np.diff(choice.pfns) > 0)
        self.coldness.went(choice.pfns)
        self.away |= set(choice.pfns.tolist())
        return choice

    def touch(self, pfns: NDArray[np.int64]) -> None:
        """Somebody wants these back."""
        for pfn in pfns.tolist():
            self.away.discard(pfn)
            self.coldness.came_back(pfn)


def test_a_cold_guest_goes_in_as_many_epochs_as_there_are_shares() -> None:
    epochs = Epochs()
    left = PAGES
    for share in SHARES:
        went = len(epochs.run().pfns)
        assert 0.7 * share * left <= went <= 1.3 * share * left
        left -= went
    assert left == 0
    assert epochs.run().later == 0


def test_nothing_more_goes_before_a_sample_was_watched() -> None:
    epochs = Epochs()
    first = epochs.run()
    early = epochs.run(after=WATCHED_SECONDS / 2)
    assert len(early.pfns) == 0
    assert early.later == PAGES - len(first.pfns)
    assert len(epochs.run(after=WATCHED_SECONDS / 2).pfns) > len(first.pfns)


def test_parts_of_an_epoch_take_their_shares_of_a_region_they_cut() -> None:
    """Whatever time lies between them; and in the next epoch the region goes one step, not two."""
    coldness = Coldness(PAGES, seed=3)
    went: list[int] = []
    for number, least in ((1, SHARES[0]), (2, SHARES[1])):
        went.clear()
        for part, now in enumerate((100.0 * number, 100.0 * number + 3)):
            coldness.begin(now, number)
            choice = coldness.choose(ALL[part * 256 : part * 256 + 256])
            coldness.went(choice.pfns)
            went.append(len(choice.pfns))
        assert all(0.5 * least * 256 <= count <= 1.6 * least * 256 for count in went), went


def test_a_hot_region_rests_and_begins_anew() -> None:
    epochs = Epochs()
    first = epochs.run().pfns
    epochs.touch(first[first < REGION])
    second = epochs.run()
    assert not np.any(second.pfns < REGION)
    assert second.resting == REGION
    assert np.any(second.pfns >= REGION)
    epochs.run()
    last = epochs.run(after=REST_SECONDS + 1)
    assert 0 < len(last.pfns) <= 1.5 * SHARES[0] * REGION, "a sample again"
    assert np.all(last.pfns < REGION)


def test_few_that_come_back_rest_by_themselves() -> None:
    epochs = Epochs()
    for _ in SHARES:
        epochs.run()
    back = np.array([5, 600, 1900])
    epochs.touch(back)
    assert epochs.run().resting == 3
    assert len(epochs.run(after=REST_SECONDS / 2).pfns) == 0
    assert set(epochs.run(after=REST_SECONDS / 2 + 1).pfns.tolist()) == set(back.tolist())


def test_a_region_that_is_wanted_back_as_a_whole_is_sampled_again() -> None:
    epochs = Epochs()
    for _ in SHARES:
        epochs.run()
    epochs.run()
    epochs.touch(ALL[:REGION])
    assert epochs.run().resting == REGION
    again = epochs.run(after=REST_SECONDS + 1)
    assert 0 < len(again.pfns) <= 1.5 * SHARES[0] * REGION


def test_a_region_with_few_candidates_is_sampled_too() -> None:
    epochs = Epochs()
    few = np.array([3, REGION + 1, REGION + 2])
    assert {pfn // REGION for pfn in epochs.run(few).pfns.tolist()} == {0, 1}


def test_what_can_not_be_paged_out_does_not_go_on_for_ever() -> None:
    """Nothing of the samples compresses: the rest is tried all the same, and then nothing is left for later."""
    coldness = Coldness(PAGES, seed=2)
    for number in range(len(SHARES)):
        coldness.begin(100.0 + number, number)
        choice = coldness.choose(ALL)
    assert choice.later == 0


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.floats(0, 200),
            st.sets(st.integers(0, PAGES - 1), max_size=300),
            st.sets(st.integers(0, PAGES - 1), max_size=50),
        ),
        max_size=12,
    )
)
def test_whatever_happened_all_that_rests_long_enough_goes(plan: list[tuple[float, set[int], set[int]]]) -> None:
    epochs = Epochs()
    for after, candidates, touched in plan:
        epochs.run(np.array(sorted(candidates), dtype=np.int64), after)
        epochs.touch(np.array(sorted(touched), dtype=np.int64))
    epochs.run(after=REST_SECONDS + 1)
    for _ in range(len(SHARES) + 1):
        last = epochs.run()
    assert len(epochs.away) + last.resting == PAGES
    epochs.run(after=REST_SECONDS + 1)
    for _ in range(len(SHARES) + 1):
        last = epochs.run()
    assert len(epochs.away) == PAGES
