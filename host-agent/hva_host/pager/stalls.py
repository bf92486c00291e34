"""How long faults waited: a histogram of bounded size, in memory that may outlive the pager."""

from __future__ import annotations

import math

#: Buckets a factor of two of time; a quantile is right to within 2 ** (1 / 8), about 9 %.
_PER_OCTAVE = 8
_SHORTEST = 1e-7
_BUCKETS = 40 * _PER_OCTAVE
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

    def as_dict(self) -> dict[str, float]:
        """The figures ``status`` shows; times in seconds."""
        return {
            "count": self.count,
            "sum_s": self.sum,
            "median_s": self.quantile(0.5),
            "p99_s": self.quantile(0.99),
            "longest_s": self.longest,
        }
