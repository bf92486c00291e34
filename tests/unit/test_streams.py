"""Read-ahead: who is sequential, how far ahead, and that it is bounded."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from hva_host.pager.streams import AROUND, AROUND_MAX, WINDOW_MAX, Streams


def read(streams: Streams, pfn: int) -> int:
    """A fault on ``pfn`` answered in full, and everything ahead of it filled; the first pfn not filled."""
    window = streams.window(pfn)
    streams.refaulted(pfn, window.now, window.pages)
    fill_ahead(streams)
    return pfn + window.pages


def fill_ahead(streams: Streams) -> list[int]:
    """Fill everything ahead of all readers; the pages left out."""
    marks = []
    while (ahead := streams.ahead()) is not None:
        if ahead.mark <= ahead.next < ahead.stop:
            marks.append(ahead.next)
            streams.left_out(ahead, ahead.next)
        else:
            stop = ahead.mark if ahead.next < ahead.mark < ahead.stop else ahead.stop
            streams.filled(ahead, min(ahead.next + AROUND_MAX, stop))
    return marks


def test_a_sequential_reader_gets_windows_that_double() -> None:
    streams, pfn, windows = Streams(), 1000, []
    for _ in range(12):
        following = read(streams, pfn)
        windows.append(following - pfn)
        pfn = following
    assert windows == [1, 2, 4, 8, 16, 32, 64, 128, 256, WINDOW_MAX, WINDOW_MAX, WINDOW_MAX]


def test_a_reader_at_its_mark_waits_for_one_page_and_the_next_window_follows() -> None:
    streams, pfn = Streams(), 0
    for _ in range(7):
        pfn = read(streams, pfn)
    window = streams.window(pfn)
    assert window.pages == 128
    streams.refaulted(pfn, window.now, window.pages)
    end, resident = pfn + 128, pfn + 128
    (mark,) = fill_ahead(streams)
    assert mark == pfn + 64
    for following in (256, 512, WINDOW_MAX):
        at_mark = streams.window(mark)
        assert (at_mark.now, at_mark.pages) == (1, 0)
        streams.refaulted(mark, 1, at_mark.pages)
        ahead = streams.ahead()
        assert ahead is not None
        assert (ahead.next, ahead.stop) == (end, end + following)
        (mark,) = fill_ahead(streams)
        assert mark == end + following // 2
        end = resident = end + following
    # One that finds its mark resident goes on behind the window.
    assert streams.window(resident).pages == WINDOW_MAX


def test_a_mark_reached_before_its_window_is_filled_makes_it_longer() -> None:
    streams = Streams()
    streams.refaulted(0, AROUND, 256)
    ahead = streams.ahead()
    assert ahead is not None
    streams.filled(ahead, ahead.mark)
    streams.left_out(ahead, 128)
    assert streams.window(128).pages == 0
    assert (ahead.next, ahead.stop, ahead.mark, ahead.window) == (129, 256 + 512, 256 + 256, 512)
    assert streams.ahead() is ahead


def test_a_random_reader_pays_for_one_page() -> None:
    streams = Streams()
    assert [streams.window(pfn * 1000).pages for pfn in range(50)] == [1] * 50


def test_resident_pages_on_the_way_are_passed_over() -> None:
    streams = Streams()
    following = read(streams, 0)
    assert streams.window(following + 5).pages == 2


def test_a_reader_that_catches_up_gets_more_at_once() -> None:
    streams = Streams()
    streams.refaulted(0, AROUND, 256)
    window = streams.window(AROUND + 3)
    assert (window.now, window.pages) == (AROUND_MAX, 256)
    assert not streams.reading_ahead


def test_no_progress_ends_a_read_ahead() -> None:
    streams = Streams()
    streams.refaulted(0, AROUND, 256)
    ahead = streams.ahead()
    assert ahead is not None
    streams.filled(ahead, ahead.next)
    assert not streams.reading_ahead


@given(st.lists(st.tuples(st.integers(0, 5000), st.integers(1, 64)), max_size=200))
def test_what_is_kept_is_bounded(faults: list[tuple[int, int]]) -> None:
    streams = Streams()
    for pfn, filled in faults:
        window = streams.window(pfn)
        assert 1 <= window.now <= min(window.pages, AROUND_MAX)
        assert window.pages <= WINDOW_MAX
        streams.refaulted(pfn, min(filled, window.now), window.pages)
    assert len(streams._expected) <= 16
    assert len(streams._ahead) <= 4
