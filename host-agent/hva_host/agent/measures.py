"""A VM's figures, from what its processes say of themselves."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from hva_host.agent import accounts
from hva_host.agent.guest_exchange import ScanReport
from hva_host.agent.guest_link import GuestLink
from hva_host.agent.model import Measure, Sample
from hvaqemu.errors import HvaError
from hvaqemu.pages import PAGE_SHIFT
from hvaqemu.qemu.process import QemuProcess


async def guest_free(guest: GuestLink, timeout: float) -> int:
    """The guest's MemFree in bytes, -1 where its agent does not answer."""
    with suppress(HvaError):
        return (await guest.stats(timeout)).memory_free_bytes
    return -1


async def measure(
    pager: Mapping[str, Any], process: QemuProcess, pager_pid: int, images: Sequence[Path], free: int
) -> Measure:
    """All figures of a VM's memory.

    :param pager: its pager's status.
    :param images: its layers.
    :param free: what :func:`guest_free` answered.
    """
    return Measure(
        uptime_s=accounts.uptime(process.start_time),
        backing_bytes=pager["backing_bytes"],
        resident_pages=pager["backing_bytes"] >> PAGE_SHIFT,
        zero_pages=pager["zero_pages"],
        layer_pages=pager["layer_pages"],
        preserved_pages=pager["preserved_pages"],
        refaults=pager["refaults"],
        refault_pages=pager["refault_pages"],
        **_by_source(pager),
        layer_pages_loaded=pager["layer_pages_loaded"],
        freed_pages=pager["freed_pages"],
        first_touches=pager.get("first_touches", 0),
        discarded_pages=pager["discarded_pages"],
        qemu_cpu_s=accounts.cpu_seconds(process.pid),
        pager_cpu_s=accounts.cpu_seconds(pager_pid),
        agent_cpu_s=accounts.cpu_seconds(os.getpid()),
        qemu_rss_bytes=accounts.own_memory(process.pid),
        pager_pss_bytes=accounts.shared_out_memory(pager_pid),
        agent_rss_bytes=accounts.all_memory(os.getpid()),
        store_bytes=pager["store_bytes"],
        store_cached_bytes=await asyncio.to_thread(_store_cached, pager, pager_pid),
        layer_cached_bytes=await asyncio.to_thread(_cached, images),
        guest_free_bytes=free,
    )


def sample(pager: Mapping[str, Any], process: QemuProcess, pager_pid: int, report: ScanReport | None) -> Sample:
    """One point of a VM's timeline, from its pager's status and the guest's newest report."""
    return Sample(
        at_s=accounts.uptime(process.start_time),
        backing_bytes=pager["backing_bytes"],
        zero_pages=pager["zero_pages"],
        layer_pages=pager["layer_pages"],
        preserved_pages=pager["preserved_pages"],
        store_bytes=pager["store_bytes"],
        store_cached_bytes=_store_cached(pager, pager_pid),
        refault_pages=pager["refault_pages"],
        **_by_source(pager),
        states=states(report),
    )


def states(report: ScanReport | None) -> dict[str, int]:
    """Pages by state in the guest's newest report; empty before the first."""
    return {state.name.lower(): count for state, count in report.totals.items()} if report else {}


def _by_source(pager: Mapping[str, Any]) -> dict[str, int]:
    # Not told by a pager that an earlier version has left in charge.
    return {name: pager.get(name, 0) for name in ("zero_refaults", "layer_refaults", "preserved_refaults")}


def _store_cached(pager: Mapping[str, Any], pager_pid: int) -> int | None:
    """How much of a store that is a file the host's page cache holds; None: it is none. Only the pager has it open."""
    number = pager.get("store_file")
    return None if number is None else accounts.cached_bytes(Path(f"/proc/{pager_pid}/fd/{number}"))


def _cached(images: Sequence[Path]) -> int:
    return sum(accounts.cached_bytes(image) for image in images)
