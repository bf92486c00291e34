"""Rates over a sliding window."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from hva_host.policy.rates import EMPTY, KNOWN_SECONDS, WINDOW_SECONDS, Window


def counted(*points: tuple[float, float]) -> Window:
    window = EMPTY
    for at_s, count in points:
        window = window.with_point(at_s, count)
    return window


def test_nothing_is_said_of_a_few_seconds() -> None:
    assert EMPTY.per_minute is None
    assert counted((0, 0), (KNOWN_SECONDS - 1, 1000)).per_minute is None
    assert counted((0, 0), (KNOWN_SECONDS, 10)).per_minute == 10


def test_what_is_older_than_the_window_is_forgotten() -> None:
    burst = [(0.0, 0.0), (1.0, 6000.0), *((float(at_s), 6000.0) for at_s in range(2, 200))]
    assert counted(*burst[:31]).per_minute == 6000
    assert counted(*burst).per_minute == 0


def test_a_counter_that_begins_anew_gives_no_rate() -> None:
    assert counted((0, 500), (30, 600), (31, 0)).per_minute is None
    assert counted((0, 500), (30, 600), (31, 0), (61, 30)).per_minute == 30


@given(st.lists(st.floats(0.1, 30), min_size=2, max_size=200), st.floats(0, 1e4))
def test_a_steady_rate_is_seen_whatever_the_looks(gaps: list[float], per_second: float) -> None:
    now, window = 0.0, EMPTY
    for gap in gaps:
        now += gap
        window = window.with_point(now, per_second * now)
        assert len(window.points) <= 16
        rate = window.per_minute
        if rate is not None:
            seen = min(1.0, (now - gaps[0]) / WINDOW_SECONDS)
            assert abs(rate - per_second * 60 * seen) <= 1e-6 * per_second * now + 1e-6


@given(st.lists(st.tuples(st.floats(0.5, 10), st.integers(0, 100)), min_size=60, max_size=120))
def test_the_window_spans_about_a_minute(looks: list[tuple[float, int]]) -> None:
    now, count, window = 0.0, 0, EMPTY
    for gap, more in looks:
        now, count = now + gap, count + more
        window = window.with_point(now, count)
    if now > 2 * WINDOW_SECONDS:
        span = window.points[-1][0] - window.points[0][0]
        assert WINDOW_SECONDS <= span <= WINDOW_SECONDS + 20
