"""How much the host is missing, at present and a few seconds from now, and how hard it is worth to try for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hva_host.policy.falling import UNSEEN, Falling, Falls
from hva_host.policy.rungs import BALLOON_RUNG, URGENT_RUNG
from hva_host.policy.samples import HostSample, Limits, Look
from hvaqemu.units import GiB, format_share, format_size

#: Of a host's memory, what is kept available unless a fleet file says otherwise: of its first 4 GiB 6 %, of the next 8
#: GiB 4 %, of the next 16 GiB 2 %, of the rest 1 %. So ESXi does since 5.0 (Mem.MinFreePct); a fixed share would keep
#: 60 GiB of a TiB.
_AVAILABLE = ((4 * GiB, 0.06), (8 * GiB, 0.04), (16 * GiB, 0.02))
_AVAILABLE_REST = 0.01
#: Below this part of what is to be kept available (of a cgroup's headroom: that) it is an emergency.
URGENT_PART = 0.5
#: Once something is missing, so much more than enough is made available, or the next page would begin it all again.
_MORE, _BUDGET_MORE = 1 / 4, 1 / 64
#: In an emergency twice as much as is to be kept: what eats memory so fast goes on while a step is under way. A
#: guest that boots and fills its memory under TCG takes 60 MiB/s, and a step some seconds.
_URGENT_TIMES = 2
#: So far is looked ahead: a look, a scan and an epoch take that long where everybody is busy. What may be missing then
#: is worth what can be read again from a layer, of whoever uses it least, and no word to people.
_AHEAD_SECONDS = 5.0
#: Where less than so many times what is to be kept is left, it is looked at often.
_NEAR_TIMES = 4
#: Beyond the budget by this share of it, it is an emergency.
_BUDGET_URGENT = 1 / 8
#: How far is gone where it is none: what guests wrote themselves stays, and balloons do.
_MILD_RUNG = 3
#: PSI names no bytes: where only it complains, this share of what all VMs hold is taken a round.
_PSI_SHARE = 1 / 64
#: It may also be about a process that thrashes in a cgroup of its own, which nothing we give would help: for its sake
#: alone only what is free or cold goes; where all processes wait at once, also what guests read but do not write.
_PSI_RUNG, _PSI_FULL_RUNG = 1, 3


@dataclass(frozen=True, slots=True)
class Need:
    """What is missing, in bytes (0: nothing), whether at once, why, and up to which rung that is worth to climb.

    :ivar short: there is less than there is to be; else only less than the little more that ends a shortage.
    """

    missing: int = 0
    urgent: bool = False
    reason: str = ""
    highest: int = 0
    short: bool = False


def kept_available(host: HostSample, limits: Limits) -> int:
    """Bytes that the host is to have available."""
    return available_least(host.total_bytes) if limits.available_bytes is None else limits.available_bytes


def available_least(total: int) -> int:
    """Bytes of a host with ``total`` that are kept available by default."""
    least = 0.0
    for size, share in _AVAILABLE:
        least += min(total, size) * share
        total = max(0, total - size)
    return int(least + total * _AVAILABLE_REST)


def need(look: Look, host: HostSample | None, limits: Limits, *, pressed: bool, falls: Falls = UNSEEN) -> Need:
    """What is missing: the most of what available memory, cgroup, budget and PSI say.

    :param host: None: too old, or not known; then only the budget counts.
    :param pressed: something was missing in the look before; then there has to be a little more than enough.
    :param falls: how fast memory went until ``host``.
    """
    held = look.held_bytes
    found = [Need()]
    if limits.budget_bytes is not None:
        over = held - (int(limits.budget_bytes * (1 - _BUDGET_MORE)) if pressed else limits.budget_bytes)
        reason = f"all VMs hold {format_size(held)} of a budget of {format_size(limits.budget_bytes)}"
        urgent = over > limits.budget_bytes * _BUDGET_URGENT
        if over > 0:
            highest = BALLOON_RUNG if urgent else BALLOON_RUNG - 1
            found.append(Need(over, urgent, reason, highest, held > limits.budget_bytes))
    if host is not None:
        found += _of_host(host, limits, held, 1 + _MORE if pressed else 1, falls)
    return Need(
        max(each.missing for each in found),
        any(each.urgent for each in found),
        "; ".join(each.reason for each in found if each.reason),
        max(each.highest for each in found),
        any(each.short for each in found),
    )


@dataclass(frozen=True, slots=True)
class Margin:
    """What is left of something, and what is to be; bytes."""

    left: int
    kept: int


def margin_of_host(host: HostSample, limits: Limits) -> Margin:
    return Margin(host.available_bytes, kept_available(host, limits))


def margin_of_group(host: HostSample, limits: Limits) -> Margin | None:
    """None: no cgroup limits the VMs below the host's own memory."""
    if host.cgroup is None:
        return None
    return Margin(host.cgroup.left_bytes, int(host.cgroup.limit_bytes * limits.cgroup_headroom))


def margins(host: HostSample, limits: Limits) -> list[Margin]:
    """All that there are."""
    return [each for each in (margin_of_host(host, limits), margin_of_group(host, limits)) if each is not None]


def _of_host(host: HostSample, limits: Limits, held: int, more: float, falls: Falls) -> Sequence[Need]:
    own, group = margin_of_host(host, limits), margin_of_group(host, limits)
    reason = f"the host has {format_size(own.left)} available, and is to have {format_size(own.kept)}"
    found = [_below(own, more, reason), _soon(falls.available, own.kept, "the host")]
    if group is not None:
        left, kept = format_size(max(0, group.left)), format_size(group.kept)
        reason = f"the VMs' cgroup has {left} left, and is to have {kept}"
        found += [_below(group, more, reason), _soon(falls.group, group.kept, "the VMs' cgroup")]
    if host.psi_some is not None and host.psi_some > limits.psi_some:
        share = format_share(round(host.psi_some, 3))
        reason = f"processes of the host wait for memory {share} of the time"
        # Every process at once waited for so long: that is what users notice.
        full = host.psi_full is not None and host.psi_full > limits.psi_some
        found.append(Need(int(held * _PSI_SHARE), False, reason, _PSI_FULL_RUNG if full else _PSI_RUNG, True))
    return found


def _below(margin: Margin, more: float, reason: str) -> Need:
    have, least = margin.left, margin.kept
    if have >= least * more:
        return Need()
    urgent = have < least * URGENT_PART
    return Need(
        int(least * (_URGENT_TIMES if urgent else more)) - have,
        urgent,
        reason,
        BALLOON_RUNG if urgent else _MILD_RUNG,
        have < least,
    )


def _soon(falling: Falling, least: int, whose: str) -> Need:
    """What an emergency will be missing that a step begun now would come in time for."""
    ahead = falling.left - int(falling.per_s * _AHEAD_SECONDS)
    if not falling.per_s or ahead >= least * URGENT_PART:
        return Need()
    left, lost = format_size(max(0, falling.left)), format_size(int(falling.per_s))
    reason = f"{whose} has {left} left, and loses {lost} a second"
    return Need(least * _URGENT_TIMES - max(0, ahead), True, reason, URGENT_RUNG, False)


def near(host: HostSample | None, limits: Limits) -> bool:
    """Whether the host may be short a few seconds from now."""
    return host is not None and any(each.left < each.kept * _NEAR_TIMES for each in margins(host, limits))
