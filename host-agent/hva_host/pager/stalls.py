"""How long faults waited: a histogram of bounded size, in memory that may outlive the pager."""

from __future__ import annotations

import math
from typing import Any

#: Buckets a factor of two of time; a quantile is right to within 2 ** (1 / 8), about 9 %.
_PER_OCTAVE = 8
_SHORTEST = 1e-7
_OCTAVES = 40
_BUCKETS = _OCTAVES * _PER_OCTAVE
_SUM, _LONGEST = 0, 1
#: Wraps, as the ledger's counters do.
_WORD = (1 << 64) - 1
STALLS_BYTES = 8 * (2 + _BUCKETS)


class Stalls:
    """Waiting times in seconds, from 0.1 µs to a day.

    :param memory: where to count, at least :data:`STALLS_BYTES` of it; goes on from what is counted there.
    """

    def __init__(self, memory: memoryview | None = None) -> None:
        view = memoryview(bytearray(STALLS_BYTES)) if memory is None else memory[:STALLS_BYTES]
        self._seconds = view[:16].cast("d")
        self._buckets = view[16:].cast("Q")

    @property
    def count(self) -> int:
        return sum(self._buckets)

    @property
    def sum(self) -> float:
        return self._seconds[_SUM]

    @property
    def longest(self) -> float:
        return self._seconds[_LONGEST]

    def add(self, seconds: float) -> None:
        """Count one wait."""
        self._seconds[_SUM] += seconds
        if seconds > self._seconds[_LONGEST]:
            self._seconds[_LONGEST] = seconds
        bucket = int(math.log2(seconds / _SHORTEST) * _PER_OCTAVE) if seconds > _SHORTEST else 0
        bucket = min(bucket, _BUCKETS - 1)
        self._buckets[bucket] = self._buckets[bucket] + 1 & _WORD

    def quantile(self, share: float) -> float:
        """The wait, in seconds, that a ``share`` (0 to 1) of all waits did not exceed; 0.0 if there were none."""
        wanted = share * self.count
        seen = 0
        for bucket, count in enumerate(self._buckets):
            seen += count
            if count and seen >= wanted:
                return float(min(_SHORTEST * 2 ** ((bucket + 1) / _PER_OCTAVE), self.longest))
        return 0.0

    def octaves(self) -> list[dict[str, float]]:
        """How many waits were in each factor of two of time, where there were any; shortest first.

        ``upper_s``: the longest such wait in seconds, which is 0.1 µs times a power of two.
        """
        counts = (sum(self._buckets[first : first + _PER_OCTAVE]) for first in range(0, _BUCKETS, _PER_OCTAVE))
        return [
            {"upper_s": _SHORTEST * 2.0 ** (octave + 1), "count": count} for octave, count in enumerate(counts) if count
        ]

    def as_dict(self) -> dict[str, Any]:
        """The figures ``status`` shows; times in seconds."""
        return {
            "count": self.count,
            "sum_s": self.sum,
            "median_s": self.quantile(0.5),
            "p99_s": self.quantile(0.99),
            "longest_s": self.longest,
            "buckets": self.octaves(),
        }
