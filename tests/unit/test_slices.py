"""Slices: all members are covered, and their size follows how long pages stayed protected."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from hva_host.agent.slices import Slices
from hva_host.pager.membership import Member

_LIMIT = 2.0
_PAGES = 1 << 22


@given(
    st.lists(st.tuples(st.integers(0, 40_000), st.integers(1, 30_000)), max_size=6),
    st.lists(st.floats(0, 10), min_size=1, max_size=30),
)
def test_every_member_is_covered_and_nobody_goes_on_for_ever(runs: list[tuple[int, int]], times: list[float]) -> None:
    wanted = np.full(220_000, Member.OUT, dtype=np.uint8)
    position = 0
    for gap, length in runs:
        position += gap
        wanted[position : position + length] = Member.COPY
        position += length
    slices, covered, number, last = Slices(_LIMIT), np.zeros(len(wanted), dtype=np.bool_), 0, 0
    for number, part in enumerate(slices.over(wanted)):
        assert part.start >= last
        last = part.start
        assert wanted[part.start] == wanted[part.stop - 1] == Member.COPY
        covered[part.start : part.stop] = True
        slices.took(times[number % len(times)])
    assert covered[wanted != Member.OUT].all()
    assert number < 500


def sizes(seconds_a_page: float, *, dense: bool = True) -> list[int]:
    """The slices of a guest whose pages all take the same time."""
    slices, found = Slices(_LIMIT), []
    wanted = np.full(_PAGES, Member.COPY if dense else Member.OUT, dtype=np.uint8)
    wanted[:: 1 << 10] = Member.COPY
    for part in slices.over(wanted):
        found.append(part.pages)
        slices.took(part.pages * seconds_a_page)
    return found


def test_a_slow_guest_is_cut_smaller_and_a_fast_one_larger() -> None:
    slow = sizes(5e-5)
    # The first takes 6 s: it comes again, in parts that take 0.3 s.
    assert slow[0] == 1 << 17
    assert all(5_500 <= pages <= 6_500 for pages in slow[3:-1])
    assert sum(slow[1:]) == _PAGES
    fast = sizes(1e-7)
    assert max(fast) > 4 * fast[0]
    assert all(later <= 1.26 * before for before, later in pairwise(fast))
    assert len(fast) < 14
    assert set(sizes(0.3 / (1 << 17))[:-1]) == {1 << 17}


def test_a_guest_that_begins_to_work_stays_below_half_of_the_limit() -> None:
    """Its scans take three times as long from one slice to the next, wherever that happens."""
    for start in range(30):
        slices, wanted, times = Slices(5.0), np.full(_PAGES, Member.COPY, dtype=np.uint8), []
        for number, part in enumerate(slices.over(wanted)):
            times.append(part.pages * (4.5e-6 if number >= start else 1.5e-6))
            slices.took(times[-1])
        assert max(times) < 2.5, start


def test_where_free_pages_end_and_page_cache_begins() -> None:
    """Parts that are fast, one after the other, then one of pages that take five times as long."""
    slices, wanted, times = Slices(5.0), np.full(_PAGES, Member.COPY, dtype=np.uint8), []
    for part in slices.over(wanted):
        slow = min(max(part.stop - _PAGES // 2, 0), part.pages)
        times.append((part.pages - slow) * 0.4e-6 + slow * 2e-6)
        slices.took(times[-1])
    assert max(times) < 2.5
    assert len(times) < 20


def test_few_members_far_apart_cost_less_than_many() -> None:
    assert sizes(1e-12, dense=False)[0] > 3 * sizes(1e-12)[0]


def test_a_short_slice_says_nothing_unless_it_was_slow() -> None:
    slices, wanted = Slices(_LIMIT), np.full(_PAGES, Member.COPY, dtype=np.uint8)
    few = np.full(_PAGES, Member.OUT, dtype=np.uint8)
    few[7] = Member.UNUSED
    for seconds in (0.001, 0.0):
        for part in slices.over(few):
            assert (part.start, part.pages) == (7, 1)
            slices.took(seconds)
        assert next(slices.over(wanted)).pages == 1 << 17
    for _ in slices.over(few):
        slices.took(0.6)
    assert next(slices.over(wanted)).pages < 1 << 17


def test_the_smallest_slice_is_not_tried_for_ever() -> None:
    slices, few = Slices(_LIMIT), np.full(_PAGES, Member.OUT, dtype=np.uint8)
    few[7] = Member.UNUSED
    for number, _ in enumerate(slices.over(few)):
        assert number < 3
        slices.took(_LIMIT * 2)
