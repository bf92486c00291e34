"""What ``hvaqemu top`` shows, from two looks at all VMs. Arithmetic only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from hva_host.agent.model import EpochStats, PolicyStatus, Record, VmState, VmStatus
from hvaqemu.pages import PAGE_SIZE


class Look(NamedTuple):
    """All VMs at one moment, in seconds of a clock that does not go back."""

    at: float
    vms: Sequence[VmStatus]


class Residences(Record):
    """Guest RAM by where its bytes are. ``untouched``: neither resident nor discarded, because nobody ever wrote it."""

    resident_bytes: int
    preserved_bytes: int
    layer_bytes: int
    zero_bytes: int
    untouched_bytes: int


class Rates(Record):
    """What happened between two looks, a second."""

    refaults: float
    zero_refaults: float
    layer_refaults: float
    preserved_refaults: float
    refaulted_bytes: float
    #: Seconds that vCPUs, taken together, waited for the pager.
    waited_s: float


class VmRow(Record):
    """One VM."""

    name: str
    state: VmState
    reason: str
    reclaim_refused: str
    memory_bytes: int
    guest_connected: bool
    #: None: the pager does not answer.
    backing_bytes: int | None
    store_bytes: int | None
    residences: Residences | None
    #: By page state, in the guest's newest scan; empty before the first.
    guest_bytes: dict[str, int]
    #: None: seen for the first time, or it is another VM of that name.
    rates: Rates | None
    longest_wait_s: float
    policy: PolicyStatus | None
    last_epoch: EpochStats | None
    disks_bytes: int


class TopView(Record):
    """All VMs, and what they come to."""

    vms: list[VmRow]
    #: Between the two looks; None: there was one.
    interval_s: float | None
    memory_bytes: int
    backing_bytes: int
    store_bytes: int
    #: Of the QEMUs, the pagers and the host agent.
    own_bytes: int


def top_view(before: Look | None, now: Look) -> TopView:
    """What two successive looks show; without the first, there are no rates."""
    seconds = now.at - before.at if before is not None else None
    earlier = {(vm.name, vm.pid): vm for vm in before.vms} if before is not None else {}
    rows = [_row(earlier.get((vm.name, vm.pid)), vm, seconds) for vm in sorted(now.vms, key=lambda vm: vm.name)]
    measures = [vm.measure for vm in now.vms if vm.measure is not None]
    return TopView(
        vms=rows,
        interval_s=seconds,
        memory_bytes=sum(row.memory_bytes for row in rows),
        backing_bytes=sum(measure.backing_bytes for measure in measures),
        store_bytes=sum(measure.store_bytes for measure in measures),
        own_bytes=sum(measure.qemu_rss_bytes + measure.pager_pss_bytes for measure in measures)
        + max((measure.agent_rss_bytes for measure in measures), default=0),
    )


def _row(before: VmStatus | None, now: VmStatus, seconds: float | None) -> VmRow:
    measure = now.measure
    return VmRow(
        name=now.name,
        state=now.state,
        reason=now.reason,
        reclaim_refused=now.reclaim_refused,
        memory_bytes=now.memory_bytes,
        guest_connected=now.guest_connected,
        backing_bytes=measure.backing_bytes if measure is not None else None,
        store_bytes=measure.store_bytes if measure is not None else None,
        residences=_residences(now),
        guest_bytes={name: pages * PAGE_SIZE for name, pages in now.states.items()},
        rates=_rates(before, now, seconds),
        longest_wait_s=now.stalls.longest_s,
        policy=now.policy,
        last_epoch=now.epochs[-1] if now.epochs else None,
        disks_bytes=sum(disk.written_bytes + disk.frozen_bytes + disk.retired_bytes for disk in now.disks),
    )


def _residences(vm: VmStatus) -> Residences | None:
    if vm.measure is None:
        return None
    measure = vm.measure
    pages = (measure.resident_pages, measure.preserved_pages, measure.layer_pages, measure.zero_pages)
    resident, preserved, layer, zero = (count * PAGE_SIZE for count in pages)
    # They are not counted at one instant: together they may be more than there is.
    rest = max(0, vm.memory_bytes - resident - preserved - layer - zero)
    return Residences(
        resident_bytes=resident, preserved_bytes=preserved, layer_bytes=layer, zero_bytes=zero, untouched_bytes=rest
    )


def _rates(before: VmStatus | None, now: VmStatus, seconds: float | None) -> Rates | None:
    if before is None or before.measure is None or now.measure is None or not seconds or seconds <= 0:
        return None
    old, new = before.measure, now.measure

    def rate(earlier: float, later: float) -> float:
        return max(0.0, later - earlier) / seconds

    return Rates(
        refaults=rate(old.refaults, new.refaults),
        zero_refaults=rate(old.zero_refaults, new.zero_refaults),
        layer_refaults=rate(old.layer_refaults, new.layer_refaults),
        preserved_refaults=rate(old.preserved_refaults, new.preserved_refaults),
        refaulted_bytes=rate(old.refault_pages, new.refault_pages) * PAGE_SIZE,
        waited_s=rate(before.stalls.sum_s, now.stalls.sum_s),
    )
