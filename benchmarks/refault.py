"""One refault: the pager's own time, beside the bare ``UFFDIO_COPY`` of one page in the same run."""

from __future__ import annotations

import random
import tempfile
import time
from pathlib import Path

from tests.kernel.harness import Guest, block, make_layer

from benchmarks.figure import Figure, median_us, show
from hva_host.memory.userfaultfd import Fill
from hva_host.pager.epoch import Member
from hva_host.pager.ram import PageBuffer
from hvaqemu.pages import PAGE_SHIFT, Run

PAGES = 4096


def main() -> None:
    """Discard a few thousand pages, touch them in random order, time each answer."""
    with tempfile.TemporaryDirectory() as folder, Guest(PAGES) as guest:
        blocks = [block(i) for i in range(PAGES)]
        guest.ram.add_layer(make_layer(Path(folder), blocks))
        bare = bare_copy(guest)
        bare_run = bare_copy(guest, 16)
        for pfn, data in enumerate(blocks):
            guest.fill(pfn, data)
        guest.run(guest.begin(dict.fromkeys(range(PAGES), Member.COPY)))
        # Every third page, so that no access continues another.
        order = list(range(0, PAGES, 3))
        random.Random(1).shuffle(order)
        times = [answer(guest, pfn) for pfn in order]
        guest.run(guest.begin(dict.fromkeys(range(PAGES), Member.COPY)))
        began = time.perf_counter()
        guest.ram.ledger.counters[0] = 0
        for pfn in range(PAGES):
            if guest.ram.ledger.entries[pfn]:
                answer(guest, pfn)
        sequential = (time.perf_counter() - began) / PAGES * 1e6
        wakes = PAGES / int(guest.ram.ledger.counters[0])
    single = median_us(times)
    show(
        "refault",
        [
            Figure("single refault, pager's own time, median / bare UFFDIO_COPY", single / bare, "<= 5", "1",
                   f"{single:.1f} µs / {bare:.2f} µs"),
            Figure("sequential refaults, µs a page with the wake-ups", sequential, "", f"{bare_run:.2f}",
                   f"{wakes:.0f} pages a refault; limit: UFFDIO_COPY in runs of 16"),
        ],
    )  # fmt: skip


def bare_copy(guest: Guest, pages: int = 1) -> float:
    """Microseconds a page of ``UFFDIO_COPY`` alone, in runs of ``pages``."""
    buffer = PageBuffer(pages)
    buffer.view[:] = block(0) * pages
    times = []
    for pfn in range(0, PAGES - pages, pages):
        start = time.perf_counter()
        result = guest.ram.uffd.copy(guest.ram.address(pfn), buffer.address, pages << PAGE_SHIFT)
        times.append(time.perf_counter() - start)
        assert result.outcome is Fill.FILLED
    guest.ram.backing.punch(Run(0, PAGES))
    return median_us(times) / pages


def answer(guest: Guest, pfn: int) -> float:
    """Have the vCPU touch a page; seconds the pager took from seeing the fault to having answered it."""
    guest.send(f"r {pfn}")
    while True:
        start = time.perf_counter()
        faults = guest.ram.uffd.read()
        if faults:
            guest.refaults.answer(faults, time.monotonic())
            spent = time.perf_counter() - start
            guest.reply()
            return spent
        if guest.answered():
            guest.reply()
            return 0.0
