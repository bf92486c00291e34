"""What a small epoch may take: a bounded number, and free pages only after a while."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hva_host.agent.steps import FREE_SECONDS, FreePages, Step
from hvaqemu.pages import PageState


def report(*free: int) -> NDArray[np.uint8]:
    classes = np.full(8, PageState.STABLE, dtype=np.uint8)
    classes[list(free)] = PageState.UNUSED
    return classes


def long_free(pages: FreePages, now: float) -> list[int]:
    return np.flatnonzero(pages.long_free(now)).tolist()


def test_a_page_counts_once_it_was_free_for_a_while() -> None:
    pages = FreePages(8)
    pages.reported(report(1, 2, 3), 100.0)
    assert long_free(pages, 100.0 + 2 * FREE_SECONDS) == []
    pages.reported(report(1, 2, 5), 100.0 + FREE_SECONDS)
    assert long_free(pages, 100.0 + FREE_SECONDS) == [1, 2]
    pages.reported(report(2, 5), 101.0 + FREE_SECONDS)
    assert long_free(pages, 101.0 + FREE_SECONDS) == [2]
    pages.reported(report(1, 2, 5), 100.0 + 2 * FREE_SECONDS)
    assert long_free(pages, 100.0 + 2 * FREE_SECONDS) == [2, 5]


def test_many_reports_at_once_are_no_while() -> None:
    pages = FreePages(8)
    for moment in range(50):
        pages.reported(report(1), 100.0 + 0.1 * moment)
        assert long_free(pages, 100.0 + 0.1 * moment) == []


def test_a_step_ends_with_its_pages() -> None:
    assert Step(10).after(4) == Step(6)
    assert Step(10).after(10) is None
    assert Step(10).after(12) is None
