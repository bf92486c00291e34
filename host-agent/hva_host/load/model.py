"""What a load is told, and what it says in the end."""

from __future__ import annotations

import math
from collections.abc import Sequence

from hva_host.agent.model import Record


class LoadOrder(Record):
    """What to ask whom."""

    host: str
    port: int
    paths: list[str]
    #: Requests a second.
    rate: float
    #: Seconds.
    timeout: float
    ready: float
    #: SHA-256 of what paths have had for an answer before, as hexadecimal digits.
    known: dict[str, str] = {}


class LoadResult(Record):
    """What came of a load. Latencies are seconds from the time a request was due to the last byte of its answer.

    A request that failed counts as one that took as long as one may.
    """

    #: Requests a second that were due.
    rate: float
    #: Seconds from the first request's time to the end.
    seconds: float
    requests: int
    #: Answers that were right, byte for byte.
    right: int
    bytes: int
    p50_s: float
    p99_s: float
    p999_s: float
    longest_s: float
    #: How late the sender itself was at the 99th percentile: the measure's own error.
    sent_late_p99_s: float
    #: How often what went wrong.
    errors: dict[str, int] = {}

    @property
    def failed(self) -> int:
        """Requests without a right answer."""
        return self.requests - self.right

    @property
    def throughput(self) -> float:
        """Right answers a second."""
        return self.right / self.seconds if self.seconds else 0.0

    def figure(self, key: str) -> float:
        """What a key of an expectation bounds."""
        return self.throughput if key == "throughput" else float(getattr(self, f"{key}_s"))


class LoadReport(Record):
    """A result, and what is now known of the answers."""

    result: LoadResult
    known: dict[str, str]


def percentile(ordered: Sequence[float], share: float) -> float:
    """The smallest value that ``share`` of all do not exceed (nearest rank); 0.0 of none.

    :param ordered: ascending.
    """
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else 0.0
