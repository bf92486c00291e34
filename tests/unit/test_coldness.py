"""Sampling: bounded steps up, one step down to nothing, and rests that end."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from hva_host.pager.coldness import REGION, REST_SECONDS, SHARES, WATCHED_SECONDS, Choice, Coldness
from hvaqemu.pages import Run

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


def test_a_bounded_choice_ends_with_the_region_it_is_reached_in() -> None:
    coldness = Coldness(PAGES, seed=5)
    coldness.begin(100.0, 1)
    first = coldness.choose(ALL, most=20)
    (region,) = set((first.pfns // REGION).tolist())
    asked = region == ALL // REGION
    assert len(first.pfns) >= 20
    assert first.later == PAGES - len(first.pfns)
    coldness.went(first.pfns)
    # The others have not been asked for a sample, so they give their first one now.
    coldness.begin(100.0 + WATCHED_SECONDS, 2)
    second = coldness.choose(ALL[~asked])
    assert len(second.pfns) < 1.3 * SHARES[0] * (PAGES - REGION)
    assert coldness.choose(ALL[asked], most=0).pfns.tolist() == []


def test_a_region_that_is_hot_again_and_again_rests_for_longer() -> None:
    coldness = Coldness(REGION, seed=2, rest_most=4 * REST_SECONDS)
    pauses = []
    now, number = 100.0, 0
    for _ in range(4):
        began = now
        while True:
            number += 1
            coldness.begin(now, number)
            if len(went := coldness.choose(np.arange(REGION)).pfns):
                break
            now += 5.0
        pauses.append(now - began)
        coldness.went(went)
        for pfn in went.tolist():
            coldness.came_back(pfn)
        now += 1.0
    assert pauses[1] < pauses[2] < pauses[3] <= 4 * REST_SECONDS + 10


def test_samples_tell_how_much_is_used() -> None:
    coldness = Coldness(PAGES, seed=4)
    coldness.there(ALL, Run(0, PAGES))
    assert coldness.cold == 0
    coldness.begin(100.0, 1)
    went = coldness.choose(ALL).pfns
    coldness.went(went)
    for pfn in went[went < 2 * REGION].tolist():
        coldness.came_back(pfn)
    coldness.begin(100.0 + WATCHED_SECONDS, 2)
    left = PAGES - 2 * REGION - np.count_nonzero(went >= 2 * REGION)
    assert coldness.cold == left


def test_what_came_back_is_not_cold_before_it_was_tried_anew() -> None:
    coldness = Coldness(PAGES, seed=4)
    coldness.there(ALL, Run(0, PAGES))
    now = 100.0
    for number, _share in enumerate(SHARES, 1):
        coldness.begin(now, number)
        coldness.went(coldness.choose(ALL).pfns)
        now += 1.0
    coldness.begin(now, len(SHARES) + 1)
    assert coldness.cold == 0
    # All that anybody touched of a region, long after; its neighbours came with it.
    for pfn in range(0, REGION, 2):
        coldness.came_back(pfn)
    coldness.begin(now + 600, len(SHARES) + 2)
    assert coldness.cold == 0
    now += 600 + 2 * REST_SECONDS
    coldness.begin(now, len(SHARES) + 3)
    went = coldness.choose(np.arange(REGION)).pfns
    coldness.went(went)
    # Not before it was watched, whatever it was like before.
    assert coldness.cold == 0
    coldness.begin(now + 1.0, len(SHARES) + 4)
    assert coldness.cold == REGION - len(went)


def test_some_are_of_few_regions_and_of_those_that_rest_last() -> None:
    coldness = Coldness(PAGES, seed=4)
    coldness.begin(100.0, 1)
    some = coldness.some(ALL, REGION + 7)
    assert len(some) == REGION + 7
    assert len(np.unique(some // REGION)) == 2
    assert np.all(np.diff(some) > 0)
    coldness.went(coldness.choose(ALL).pfns)
    for pfn in range(REGION):
        coldness.came_back(pfn)
    coldness.begin(101.0, 2)
    most = coldness.some(ALL, PAGES - REGION)
    assert most[0] == REGION
    assert len(coldness.some(ALL, 2 * PAGES)) == PAGES
    assert len(coldness.some(ALL[:0], 5)) == 0


def test_what_others_have_discarded_is_not_cold_and_resident() -> None:
    coldness = Coldness(PAGES, seed=4)
    coldness.there(ALL, Run(0, PAGES))
    coldness.begin(100.0, 1)
    went = coldness.choose(ALL).pfns
    coldness.went(went)
    coldness.begin(101.0, 2)
    assert coldness.cold == PAGES - len(went)
    coldness.went(np.setdiff1d(ALL, went), chosen=False)
    assert coldness.cold == 0


def test_what_is_not_there_any_more_is_not_cold() -> None:
    coldness = Coldness(PAGES, seed=4)
    coldness.there(ALL, Run(0, PAGES))
    coldness.begin(100.0, 1)
    coldness.went(coldness.choose(ALL).pfns)
    coldness.begin(101.0, 2)
    assert coldness.cold > PAGES / 2
    coldness.there(ALL[:0], Run(0, PAGES))
    assert coldness.cold == 0


def test_what_can_not_go_keeps_nothing_else_from_being_tried() -> None:
    pages = 64 * REGION
    every = np.arange(pages)
    stays = every % 10 == 0
    coldness = Coldness(pages, seed=4)
    left, now = every, 100.0
    for number in range(2000):
        now += 2.0
        coldness.begin(now, number)
        tried = np.concatenate([coldness.choose(part, 100).pfns for part in coldness.parts(left)])
        coldness.stayed(tried[stays[tried]])
        coldness.went(tried[~stays[tried]])
        left = np.setdiff1d(left, tried[~stays[tried]])
    assert len(left) < 1.1 * np.count_nonzero(stays)
