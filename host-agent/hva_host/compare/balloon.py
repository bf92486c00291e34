"""A fair balloon: what size a guest's own statistics justify. Arithmetic; :mod:`.balloon_keeper` carries it out.

After the rules of a manager that is in use (oVirt's MOM, doc/balloon.rules), with three changes. Two favour the
balloon: MOM counts memory that is free, and here page cache that the guest can drop counts too (MemAvailable), so it
takes more; MOM decides every ten seconds, and here it is every second, so it gets there ten times as fast. One favours
the guest: it gets what it is short of at any time, and more where it reads again what it had to let go of. MOM lets
guests grow only while the host is not short, and does not look at the other.
"""

from __future__ import annotations

from dataclasses import dataclass

from hvaqemu.units import MiB

#: What stays available to a guest, of what it has (MOM's min_guest_free_percent).
RESERVE_SHARE = 0.20
#: Shares of the host's memory that are free: below the first MOM leaves guests less, below the second it lets them swap
#: (pressure_threshold, pressure_critical).
SHORT_SHARE = 0.20
CRITICAL_SHARE = 0.05
#: By how much a balloon changes at once, of what the guest has (MOM's max_balloon_change_percent); growing may be more.
STEP_SHARE = 0.05
#: A change that is not worth a command, of what the guest has (MOM's min_balloon_change_percent), and what QEMU's
#: balloon is counted in here.
LEAST_SHARE = 0.0025
UNIT = MiB
#: Major faults a second of a guest that runs out of cache for its programs: 400 KiB/s read again through mappings.
#: Starting a program takes some too, so it is looked at only while a balloon is in the way.
FAULTS_PER_SECOND = 100.0


@dataclass(frozen=True)
class Word:
    """What a guest says of its memory, bytes."""

    #: Seconds, whole ones, by a clock of the host's.
    at: int
    available: int
    #: Since boot.
    major_faults: int = 0
    swapped_in: int = 0


@dataclass(frozen=True)
class Bounds:
    """What a balloon leaves a guest at least and at most, bytes."""

    least: int
    most: int


def reserve_share(host_free: float) -> float:
    """What stays available to a guest, of what it has, while so much of its host's memory is free; MOM's rule.

    Not more than nothing where the host is at its end: then guests are to swap.

    :param host_free: a share, 0 to 1, of the host or of the control group that the guests are in.
    """
    if host_free <= CRITICAL_SHARE:
        return host_free - CRITICAL_SHARE
    return RESERVE_SHARE * min(1.0, host_free / SHORT_SHARE)


def reserve(size: int, share: float = RESERVE_SHARE) -> int:
    """Bytes that stay available to a guest of ``size`` bytes."""
    return int(size * share)


def next_size(
    size: int, bounds: Bounds, word: Word, before: Word | None, *, may_shrink: bool, share: float = RESERVE_SHARE
) -> int:
    """What the guest is to have next, bytes.

    :param size: what it has.
    :param word: its word, from after it got ``size``; :param before: an earlier one.
    :param may_shrink: else it only grows.
    :param share: its reserve, of what it has; with nothing or less it is meant to swap, and does not grow for that.
    """
    missing = reserve(size, share) - word.available
    step = int(size * STEP_SHARE)
    if missing > 0 or (share > 0 and _suffers(word, before)):
        # All that is missing at once: a guest that is short can not wait for steps.
        return max(size, min(bounds.most, _up(size + max(step, missing))))
    if not may_shrink:
        return size
    wanted = max(bounds.least, _up(size - min(step, -missing)))
    return wanted if size - wanted >= max(UNIT, int(size * LEAST_SHARE)) else size


def _suffers(word: Word, before: Word | None) -> bool:
    """Whether a guest reads again what it had to let go of."""
    if before is None or word.at <= before.at:
        return False
    faults = (word.major_faults - before.major_faults) / (word.at - before.at)
    return faults > FAULTS_PER_SECOND or word.swapped_in > before.swapped_in


def _up(size: int) -> int:
    return -(-size // UNIT) * UNIT
