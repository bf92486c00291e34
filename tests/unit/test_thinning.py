"""A series stays bounded, in order, even, and never loses its newest point."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from hva_host.agent.thinning import Thinned


@given(st.integers(1, 40).map(lambda half: 2 * half), st.integers(0, 500))
def test_bounded_and_in_order(most: int, count: int) -> None:
    series: Thinned[int] = Thinned(most, 1.0)
    for at in range(count):
        series.add(at)
    assert len(series.points) <= most
    assert series.points == sorted(set(series.points))
    if count:
        assert series.points[0] == 0
        assert series.points[-1] == count - 1


def test_what_goes_can_leave_something_behind() -> None:
    series: Thinned[int] = Thinned(8, 1.0, min)
    for at in (5, 9, 5, 1, 5, 9, 5, 2, 5):
        series.add(at)
    assert series.points == [5, 1, 5, 2, 5]


def test_thinning_slows_down() -> None:
    series: Thinned[int] = Thinned(8, 1.0)
    for at in range(9):
        series.add(at)
    assert series.interval == 2.0
    assert series.points == [0, 2, 4, 6, 8]
