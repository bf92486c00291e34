"""Looks at VMs and hosts for tests of policy: a plain one, of which a test changes what it is about."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hva_host.policy.decide import decide
from hva_host.policy.decisions import Decisions, Purpose
from hva_host.policy.samples import (
    Condition,
    Epoch,
    GuestWord,
    HostSample,
    Limits,
    Look,
    Refaults,
    Report,
    VmSample,
)
from hva_host.policy.state import Facts, Order, Outcome, PolicyMemory
from hvaqemu.pages import PAGE_SHIFT
from hvaqemu.reclaim_config import ReclaimConfig, ReclaimState
from hvaqemu.units import GiB, MiB

#: Pages of a MiB.
MEG = MiB >> PAGE_SHIFT

VM = VmSample(
    name="a",
    at_s=100.0,
    condition=Condition.RUNNING,
    guest_connected=True,
    memory_bytes=512 * MiB,
    backing_bytes=400 * MiB,
    store_bytes=0,
    report=Report(age_s=1.0, unused=100 * MEG, volatile=200 * MEG, potential=10 * MEG, stable=202 * MEG),
    guest=GuestWord(age_s=1.0, total_bytes=500 * MiB, available_bytes=300 * MiB, psi_some=0.0, psi_full=0.0),
    balloon_bytes=512 * MiB,
)
HOST = HostSample(at_s=100.0, total_bytes=8 * GiB, available_bytes=4 * GiB, psi_some=0.0, psi_full=0.0)


def config(**keys: Any) -> ReclaimConfig:
    """With keys as they are written in a file."""
    return ReclaimConfig.model_validate(keys)


def limits(vms: dict[str, ReclaimConfig], **more: Any) -> Limits:
    return Limits(reclaim=vms, **more)


def facts(sample: VmSample = VM, now: float = 100.0, **changes: Any) -> Facts:
    """Of a VM in mode proactive that refaults nothing and may be stepped at."""
    plain = Facts(
        now=now,
        sample=sample,
        config=config(mode="proactive"),
        rate=0.0,
        working_set=100_000.0,
        resident=sample.backing_bytes >> PAGE_SHIFT,
        unused=0,
        spare=(sample.backing_bytes - 64 * MiB) >> PAGE_SHIFT,
        outcome=None,
        earliest_s=now,
        unscanned_s=changes.get("earliest_s", now),
    )
    return replace(plain, **changes)


def outcome(
    discarded: int,
    pages: int = 1000,
    states: tuple[ReclaimState, ...] = (ReclaimState.VOLATILE,),
    purpose: Purpose = Purpose.PROACTIVE,
    **order: Any,
) -> Outcome:
    """Of a step that was ordered at 90 s."""
    plain = Order(0, 90.0, states, pages, True, purpose, 0, 0.0, 0)
    return Outcome(replace(plain, **order), discarded, 0)


def epoch(number: int, discarded: int = 0, **more: Any) -> Epoch:
    return Epoch(number, 0.0, discarded, 0, discarded, 0, **more)


def at(now: float, sample: VmSample = VM, **changes: Any) -> VmSample:
    """The same VM later."""
    return replace(sample, at_s=now, **changes)


def refaulted(count: int) -> Refaults:
    return Refaults(layer=count)


def decided(
    vms: list[VmSample], allowed: Limits, now: float, memory: PolicyMemory | None = None, host: HostSample | None = HOST
) -> tuple[PolicyMemory, Decisions]:
    """One call, with the host seen at the same time."""
    seen = None if host is None else replace(host, at_s=now)
    return decide(memory or PolicyMemory(), Look(seen, tuple(vms)), allowed, now)
