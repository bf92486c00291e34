"""Runs of pages, in both forms the code has them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hva_host.memory.runs import runs_of, runs_of_pfns
from hvaqemu.pages import Run, coalesce

pfns = st.sets(st.integers(0, 200)).map(sorted)


@given(pfns)
def test_runs_cover_exactly_the_pages_and_touch_nowhere(given_pfns: list[int]) -> None:
    runs = list(coalesce(given_pfns))
    assert [pfn for run in runs for pfn in range(run.start, run.stop)] == given_pfns
    assert all(a.stop < b.start for a, b in itertools.pairwise(runs))


@given(pfns)
def test_numpy_runs_are_the_same(given_pfns: list[int]) -> None:
    wanted = list(coalesce(given_pfns))
    mask = np.zeros(256, dtype=np.bool_)
    mask[given_pfns] = True
    assert runs_of(mask) == wanted
    assert runs_of(mask, 1000) == [Run(run.start + 1000, run.pages) for run in wanted]
    assert runs_of_pfns(np.array(given_pfns, dtype=np.int64)) == wanted


def test_pfns_must_ascend() -> None:
    with pytest.raises(ValueError, match="does not ascend"):
        list(coalesce([3, 2]))
