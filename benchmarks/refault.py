"""Refaults: the pager's own time for one, beside the bare ``UFFDIO_COPY`` of one page in the same run.

A vCPU reads one byte of each of many pages in a row, so that it faults again as soon as it was answered. In one pass
each fault is answered by ``UFFDIO_COPY`` alone, in the next by the pager. Either way the system call also wakes the
vCPU, which on a virtual host costs more than the copy; the copy that wakes nobody is shown beside it.
"""

from __future__ import annotations

import random
import tempfile
import time
from pathlib import Path

from benchmarks.figure import Figure, median_us, show
from hva_host.memory.ledger import Counter
from hva_host.memory.userfaultfd import Fault, Fill
from hva_host.pager.membership import Member
from hva_host.pager.ram import PageBuffer
from hvaqemu.pages import PAGE_SHIFT, Run
from tests.kernel.harness import Guest, block, make_layer

PAGES = 16384


def main() -> None:
    """Random and sequential passes over discarded pages."""
    with tempfile.TemporaryDirectory() as folder, Guest(PAGES) as guest:
        blocks = [block(i) for i in range(PAGES)]
        guest.ram.add_layer(make_layer(Path(folder), blocks))
        unwoken, in_runs = copy_alone(guest, 1), copy_alone(guest, 16)
        # Every third page, shuffled: no access continues another.
        order = list(range(0, PAGES, 3))
        random.Random(1).shuffle(order)
        bare = median_us(touch(guest, order, bare=True))
        guest.ram.backing.punch(Run(0, PAGES))
        for pfn, data in enumerate(blocks):
            guest.fill(pfn, data)
        discard(guest)
        own = median_us(answer(guest, order))
        discard(guest)
        single = median_us(touch(guest, order))
        discard(guest)
        guest.ram.ledger.counters[Counter.REFAULTS] = 0
        began = time.perf_counter()
        touch(guest, list(range(PAGES)))
        sequential = (time.perf_counter() - began) / PAGES * 1e6
        run = PAGES / guest.ram.ledger.counters[Counter.REFAULTS]
    show(
        "refault",
        [
            Figure("single refault, own time of the pager, median / bare UFFDIO_COPY", own / unwoken, "<= 5", "1",
                   f"{own:.1f} µs / {unwoken:.1f} µs, nobody to wake in either"),
            Figure("the same with a vCPU that waits and is woken by it", single / bare, "", "1",
                   f"{single:.1f} µs / {bare:.1f} µs"),
            Figure("sequential refaults, µs a page until the vCPU has all", sequential, "", f"{in_runs:.2f}",
                   f"{run:.0f} pages a refault; limit: UFFDIO_COPY in runs of 16"),
        ],
    )  # fmt: skip


def discard(guest: Guest) -> None:
    """Make every page a layer page."""
    guest.run(guest.begin(dict.fromkeys(range(PAGES), Member.COPY), seconds=60))
    assert guest.ram.backing.used_bytes() == 0


def copy_alone(guest: Guest, pages: int) -> float:
    """Microseconds a page of ``UFFDIO_COPY`` for nobody, in runs of ``pages``."""
    buffer = PageBuffer(pages)
    buffer.view[:] = block(0) * pages
    times = []
    for pfn in range(0, PAGES, pages):
        start = time.perf_counter()
        result = guest.ram.uffd.copy(guest.ram.address(pfn), buffer.address, pages << PAGE_SHIFT)
        times.append(time.perf_counter() - start)
        assert result.outcome is Fill.FILLED
    guest.ram.backing.punch(Run(0, PAGES))
    return median_us(times) / pages


def answer(guest: Guest, order: list[int]) -> list[float]:
    """Seconds the pager takes for each of these faults when nobody waits."""
    times = []
    for pfn in order:
        faults = [Fault(guest.ram.address(pfn), False)]
        start = time.perf_counter()
        guest.refaults.answer(faults, start)
        times.append(time.perf_counter() - start)
    return times


def touch(guest: Guest, order: list[int], *, bare: bool = False) -> list[float]:
    """Have the vCPU read pages; the seconds each answer took, from the fault being known to its answer."""
    buffer = PageBuffer(1)
    times: list[float] = []
    guest.send("m " + " ".join(map(str, order)))
    while not guest.answered():
        while faults := guest.ram.uffd.read():
            start = time.perf_counter()
            if bare:
                guest.ram.uffd.copy(faults[0].address, buffer.address, 1 << PAGE_SHIFT)
            else:
                guest.refaults.answer(faults, start)
            times.append(time.perf_counter() - start)
        if not bare:
            guest.refaults.read_ahead()
    guest.reply()
    return times
