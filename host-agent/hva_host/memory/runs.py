"""Runs and pieces of pages in numpy arrays."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from hvaqemu.pages import Run


def runs_of(mask: NDArray[np.bool_], offset: int = 0) -> list[Run]:
    """The maximal runs of true elements of ``mask`` (shape ``(n,)``), as pfns counted from ``offset``."""
    padded = np.zeros(len(mask) + 2, dtype=np.int8)
    padded[1:-1] = mask
    edges = np.flatnonzero(np.diff(padded))
    return [Run(start + offset, stop - start) for start, stop in edges.reshape(-1, 2).tolist()]


def runs_of_pfns(pfns: NDArray[np.int64]) -> list[Run]:
    """The maximal runs of strictly ascending ``pfns`` (shape ``(n,)``)."""
    if not len(pfns):
        return []
    breaks = np.flatnonzero(np.diff(pfns) != 1) + 1
    starts = pfns[np.concatenate(([0], breaks))]
    counts = np.diff(np.concatenate(([0], breaks, [len(pfns)])))
    return [Run(start, count) for start, count in zip(starts.tolist(), counts.tolist(), strict=True)]


def chunks_of(pfns: NDArray[np.int64], size: int) -> Iterator[NDArray[np.int64]]:
    """``pfns`` (shape ``(n,)``) in pieces of ``size``, the last one perhaps smaller; views."""
    for start in range(0, len(pfns), size):
        yield pfns[start : start + size]
