"""What a guest uses, in pages, from what is resident, its report and coldness sampling.

Free pages are not used, nor is what samples show to be cold. Everything else that is resident counts as used, because
nothing says that it is not: so the estimate begins too high (a budget that is a share of it is then too generous by as
much, but sampling covers more with every step) and comes down as more is sampled. What has gone and come back is used.
"""

from __future__ import annotations

import math

from hva_host.policy.samples import VmSample
from hvaqemu.pages import PAGE_SHIFT

#: A new estimate counts by this much after a minute: one look at a guest that just woke or slept is not its life.
_SMOOTH_SECONDS = 60.0


def resident_unused(sample: VmSample) -> int:
    """Free pages that still occupy host memory. Discarded free pages are ZERO; so are some others, which makes this
    too small rather than too large."""
    if sample.report is None:
        return 0
    return min(max(0, sample.report.unused - sample.zero_pages), sample.backing_bytes >> PAGE_SHIFT)


def estimate(sample: VmSample) -> int | None:
    """Pages in use as one look tells; None: the guest never reported."""
    if sample.report is None:
        return None
    held = (sample.backing_bytes >> PAGE_SHIFT) - resident_unused(sample)
    return max(0, held - sample.cold_pages)


def smoothed(before: float | None, now: int | None, seconds: float) -> float | None:
    """The estimate with its past.

    :param before: what this returned ``seconds`` ago; None: nothing was known.
    :param now: what :func:`estimate` says.
    """
    if now is None or before is None:
        return before if now is None else float(now)
    return now + (before - now) * math.exp(-max(0.0, seconds) / _SMOOTH_SECONDS)
