"""Rungs of a ladder that say how hard a host that is short tries: pages that are free or cold at first, at the top what
guests use, at last their balloons."""

from __future__ import annotations

from hvaqemu.reclaim_config import ReclaimState

UNUSED, VOLATILE, POTENTIAL, STABLE = ReclaimState

#: What is tried on each rung, and whether by samples. From the second half on, users' ``states`` do not bind: what
#: comes after them is a guest killed for want of memory.
RUNGS: tuple[tuple[tuple[ReclaimState, ...], bool], ...] = (
    ((UNUSED,), True),
    ((UNUSED, VOLATILE), True),
    ((UNUSED, VOLATILE), False),
    ((UNUSED, VOLATILE, POTENTIAL), False),
    ((UNUSED, VOLATILE, POTENTIAL, STABLE), False),
)
URGENT_RUNG = 2
#: The rung above: balloons.
BALLOON_RUNG = len(RUNGS)
