"""Runs of pages, in both forms the code has them."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from hva_host.memory.runs import runs_of, runs_of_pfns
from hvaqemu.pages import Run

pfns = st.sets(st.integers(0, 200)).map(sorted)


def coalesce(given_pfns: list[int]) -> list[Run]:
    """The maximal runs of ascending pfns, one page after the other."""
    runs: list[Run] = []
    for pfn in given_pfns:
        if runs and runs[-1].stop == pfn:
            runs[-1] = Run(runs[-1].start, runs[-1].pages + 1)
        else:
            runs.append(Run(pfn, 1))
    return runs


@given(pfns)
def test_runs_cover_exactly_the_pages_and_touch_nowhere(given_pfns: list[int]) -> None:
    runs = runs_of_pfns(np.array(given_pfns, dtype=np.int64))
    assert [pfn for run in runs for pfn in range(run.start, run.stop)] == given_pfns
    assert all(a.stop < b.start for a, b in itertools.pairwise(runs))


@given(pfns)
def test_both_forms_find_the_same_runs(given_pfns: list[int]) -> None:
    wanted = coalesce(given_pfns)
    mask = np.zeros(256, dtype=np.bool_)
    mask[given_pfns] = True
    assert runs_of(mask) == wanted
    assert runs_of(mask, 1000) == [Run(run.start + 1000, run.pages) for run in wanted]
    assert runs_of_pfns(np.array(given_pfns, dtype=np.int64)) == wanted
