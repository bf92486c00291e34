"""The last rung: guests are made to give memory up, and get it back when the host has it again.

Only a balloon takes what a guest uses without paging; it also makes the guest's own kernel short. So it is used when
nothing else is left, never below what the guest says it can not give, and given back in pieces.
"""

from __future__ import annotations

from collections.abc import Sequence

from hva_host.policy import shortage
from hva_host.policy.decisions import Balloon, Purpose
from hva_host.policy.guest_short import AVAILABLE_BYTES, AVAILABLE_SHARE, WORD_SECONDS
from hva_host.policy.samples import Condition, HostSample, Limits
from hva_host.policy.shortage import Need
from hva_host.policy.state import Facts
from hvaqemu.units import MiB

#: Bytes that a balloon is changed by at least; less is not worth a command.
LEAST = 8 * MiB
#: Between two changes: the guest's own kernel has to give the pages up first.
SECONDS = 10.0
#: At most this share of a guest's memory at once, either way.
_STEP_SHARE = 1 / 8
#: A guest keeps this share of its memory in any case: its kernel and what starts it again.
_KEEP_SHARE = 1 / 4
#: Host and cgroup have this many times what they are to keep before any is given back, or it would be taken again.
_BACK_ABOVE = 1.5


def inflated(able: Sequence[Facts], wanted: Need) -> list[Balloon]:
    """What to take from guests, those with most to spare first."""
    room = {facts.sample.name: facts for facts in able if _spare(facts) >= LEAST}
    missing, found = wanted.missing, []
    for name, facts in sorted(room.items(), key=lambda each: (-_spare(each[1]), each[0])):
        if missing <= 0:
            break
        now = facts.sample.balloon_bytes
        assert now is not None
        size = max(LEAST, min(_spare(facts), missing, int(facts.sample.memory_bytes * _STEP_SHARE)))
        missing -= size
        taken = facts.sample.ballooned_bytes + size
        found.append(Balloon(name, now - size, taken, Purpose.EMERGENCY, wanted.reason))
    return found


def deflated(taken: Sequence[Facts], host: HostSample | None, limits: Limits, held: int) -> list[Balloon]:
    """What to give back now that nothing has been missing for a while.

    :param taken: guests from which :func:`inflated` took something.
    :param held: bytes of backing and store of all VMs.
    """
    if host is None:
        return []
    margins = shortage.margins(host, limits)
    if any(each.left < each.kept * _BACK_ABOVE for each in margins):
        return []
    room = min(each.left - each.kept for each in margins)
    if limits.budget_bytes is not None:
        room = min(room, limits.budget_bytes - held)
    found = []
    for facts in taken:
        sample = facts.sample
        if sample.condition is not Condition.RUNNING or sample.balloon_bytes is None:
            continue
        owed = min(sample.ballooned_bytes, sample.memory_bytes - sample.balloon_bytes)
        size = min(owed, max(LEAST, int(sample.memory_bytes * _STEP_SHARE)))
        if 0 < size <= room:
            room -= size
            left, why = owed - size, "the host has memory again"
            found.append(Balloon(sample.name, sample.balloon_bytes + size, left, Purpose.PRESSURE, why))
    return found


def _spare(facts: Facts) -> int:
    """Bytes that a guest can give by its balloon; 0 where it did not say lately."""
    sample, word = facts.sample, facts.sample.guest
    if sample.balloon_bytes is None or sample.condition is not Condition.RUNNING:
        return 0
    if word is None or word.age_s > WORD_SECONDS:
        return 0
    # Twice the bound below which it counts as short.
    own = word.available_bytes - 2 * max(AVAILABLE_BYTES, int(word.total_bytes * AVAILABLE_SHARE))
    keep = max(facts.config.min_resident, int(sample.memory_bytes * _KEEP_SHARE))
    return max(0, min(own, sample.balloon_bytes - keep))
