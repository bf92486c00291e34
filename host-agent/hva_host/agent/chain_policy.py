"""When a disk is frozen and what is merged: arithmetic only, no I/O and no clock.

Freezing costs nothing by itself; it is worth while once much was written that pages could be matched with. Merging
rewrites what lies in the merged files, so how much is merged at once decides how often a byte is written over a VM's
life. The rule is that of a log-structured tree: a file is merged into only when what lies above it is of its own order
of size, so a byte moves down a logarithmic number of times, and the chain of n bytes frozen in pieces of p has some
log2(n/p) files between merges. A bound on the depth holds whatever the sizes are.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

from hvaqemu.config import FreezeConfig

#: What lies above a file must be at least this share of it before it is written to again.
_WORTH_IT = 0.5


@dataclass(frozen=True)
class DiskSample:
    """A disk of a VM now: bytes its writable file occupies, seconds since it was frozen last (None: never)."""

    written: int
    since: float | None


class Freeze(enum.Enum):
    """Whether a disk is to be frozen now."""

    NO = enum.auto()
    NOW = enum.auto()
    #: It would be, were it not for the disk budget.
    BUDGET = enum.auto()


def freeze(disk: DiskSample, config: FreezeConfig, used: int) -> Freeze:
    """Whether to freeze a disk now.

    :param used: bytes of all files of the VM's disks, which the budget is for.
    """
    if config.after is None or disk.written < config.after:
        return Freeze.NO
    if disk.since is not None and disk.since < config.every:
        return Freeze.NO
    # What is written from now on needs room too: as much again until the next freeze.
    return Freeze.NOW if used + config.after <= config.disk_budget else Freeze.BUDGET


def merge_down_to(frozen: Sequence[int], depth: int) -> int | None:
    """Which frozen file all above it are merged into, by its place from the bottom; None: the chain is short enough.

    The lowest that is not much larger than all above it together, so that little is moved for each byte that is kept.

    :param frozen: bytes of each, bottom first.
    :param depth: how many there may be.
    """
    if len(frozen) <= depth:
        return None
    last = len(frozen) - 2
    for place in range(last + 1):
        if sum(frozen[place + 1 :]) >= _WORTH_IT * frozen[place]:
            return min(place, depth - 1)
    return min(last, depth - 1)
