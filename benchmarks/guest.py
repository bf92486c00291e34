"""On a real guest: how far it shrinks, what the balloon does, what re-reading costs, how fast it scans."""

from __future__ import annotations

import asyncio
import re
import tempfile
from pathlib import Path

from benchmarks.figure import Figure, show
from hva_host.agent.fleet import Fleet
from hva_host.agent.model import Measure
from hva_host.agent.vm import Vm
from hvaqemu.config import VmConfig
from hvaqemu.reclaim_config import DEFAULT_STATES
from hvaqemu.units import MiB, format_size

FILL = "find /usr -xdev -type f -print0 | xargs -0 cat | md5sum"
#: Of the root disk itself, through the guest's page cache: 320 MiB, as large as its cache comfortably holds.
READ = "dd if=/dev/vda of=/dev/null bs=64k count=5120"
_SECONDS = re.compile(rb"copied, ([0-9.e-]+) s")


def main() -> None:
    """Boot a guest and take its figures."""
    asyncio.run(_main())


async def _main() -> None:
    with tempfile.TemporaryDirectory(prefix="hvabench") as runtime:
        fleet = Fleet(Path(runtime), embedded=True)
        try:
            config = VmConfig(name="bench", memory=512 * MiB, cpus=2, allow_exec=True)
            vm = await fleet.up(config, lambda _line: None)
            figures = await rereading(vm)
            figures += await scanning(vm)
            figures += await shrinking(vm)
        finally:
            await fleet.close()
    show("guest", figures)


async def run(vm: Vm, command: str) -> bytes:
    """Run a shell command in the guest; what it said."""
    result = await vm.execute(["sh", "-c", command], timeout=300)
    assert result.ok, result
    return result.stdout + result.stderr


async def read_seconds(vm: Vm) -> float:
    """Seconds the guest's ``dd`` took, by its own clock."""
    found = _SECONDS.search(await run(vm, READ))
    assert found is not None
    return float(found[1])


async def rereading(vm: Vm) -> list[Figure]:
    """Re-reading page cache: resident, and fully discarded."""
    await read_seconds(vm)
    resident, discarded, brought = [], [], 0
    for _ in range(5):
        resident.append(await read_seconds(vm))
        await vm.reclaim(DEFAULT_STATES)
        before = (await vm.measure()).refault_pages
        discarded.append(await read_seconds(vm))
        brought = (await vm.measure()).refault_pages - before
    stalls = (await vm.status()).stalls
    return [
        Figure("re-reading fully discarded cache (dd, sequential) / resident", min(discarded) / min(resident),
               "<= 1.2", "1", f"{min(discarded):.3f} s / {min(resident):.3f} s; {brought} pages refaulted"),
        Figure("vCPU waits, median, µs", stalls.median_s * 1e6, "", "",
               f"p99 {stalls.p99_s * 1e6:.0f} µs, longest {stalls.longest_s * 1e3:.1f} ms, {stalls.count} waits"),
    ]  # fmt: skip


async def scanning(vm: Vm) -> list[Figure]:
    """Scans of the guest, and how large their reports are."""
    reports = [await vm.guest.scan(10) for _ in range(9)]
    pages = len(reports[0].classes)
    fastest = min(report.guest_seconds for report in reports)
    size = max(report.wire_bytes for report in reports) * 131072 / pages
    return [
        Figure("guest scan under TCG, million pages a second", pages / fastest / 1e6, ">= 2", "",
               f"{pages} pages in {fastest * 1e3:.0f} ms"),
        Figure("report size, KiB per 131,072 pages", size / 1024, "<= 8"),
    ]  # fmt: skip


async def shrinking(vm: Vm) -> list[Figure]:
    """Fill the guest's page cache, reclaim, and balloon for comparison."""
    await run(vm, FILL)
    filled = await vm.measure()
    await vm.reclaim(DEFAULT_STATES)
    reclaimed = await vm.measure()
    await run(vm, FILL)
    await vm.balloon(128 * MiB, 120)
    ballooned = await vm.measure()
    await vm.balloon(512 * MiB, 120)
    return [
        Figure("backing after reclaim / when filled", reclaimed.backing_bytes / filled.backing_bytes, "<= 0.17", "",
               _memory(reclaimed) + " / " + _memory(filled)),
        Figure("backing after QMP balloon to 128 MiB / when filled", ballooned.backing_bytes / filled.backing_bytes,
               "", "", _memory(ballooned)),
    ]  # fmt: skip


def _memory(measure: Measure) -> str:
    return f"{format_size(measure.backing_bytes)} (guest free {format_size(measure.guest_free_bytes)})"
