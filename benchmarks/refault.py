"""Refaults: the pager's own time for one, beside the bare ``UFFDIO_COPY`` of one page in the same run.

A vCPU reads one byte of each of many pages in a row, so that it faults again as soon as it was answered. In one pass
each fault is answered by ``UFFDIO_COPY`` alone, in the next by the pager. Either way the system call also wakes the
vCPU, which on a virtual host costs more than the copy; the copy that wakes nobody is shown beside it.

Then pages of 256 MiB in random order, read and written, with read-ahead as it is and with none: whoever reads at random
must not pay for those who read in order.
"""

from __future__ import annotations

import random
import tempfile
import time
from pathlib import Path
from statistics import quantiles
from typing import NamedTuple

from benchmarks.figure import Figure, median_us, show
from hva_host.memory.ledger import Counter
from hva_host.memory.userfaultfd import Fault, Fill
from hva_host.pager.membership import Member
from hva_host.pager.ram import PageBuffer
from hva_host.pager.streams import Streams, Window
from hvaqemu.pages import PAGE_SHIFT, Run
from tests.kernel.harness import Guest, block, make_layer

PAGES = 16384
#: Of a file that is read and written at random: 256 MiB.
RANDOM_PAGES = 65536
#: Pages touched one way, before as many are touched the other way: what else the machine does meets both alike.
_CHUNK = 1024
_TIMES = 4


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
        sequential = timed(guest, "m", list(range(PAGES)))
        run = PAGES / guest.ram.ledger.counters[Counter.REFAULTS]
    reads, writes = at_random("m"), at_random("t")
    show(
        "refault",
        [
            Figure("single refault, own time of the pager, median / bare UFFDIO_COPY", own / unwoken, "<= 5", "1",
                   f"{own:.1f} µs / {unwoken:.1f} µs, nobody to wake in either"),
            Figure("the same with a vCPU that waits and is woken by it", single / bare, "", "1",
                   f"{single:.1f} µs / {bare:.1f} µs"),
            Figure("sequential refaults, µs a page until the vCPU has all", sequential, "", f"{in_runs:.2f}",
                   f"{run:.0f} pages a refault; limit: UFFDIO_COPY in runs of 16"),
            *(
                Figure(f"{RANDOM_PAGES >> 8} MiB {what} at random, a page each / the same without read-ahead",
                       it.own / it.alone, "<= 1.1", "1",
                       f"{it.own:.1f} µs / {it.alone:.1f} µs a page until the vCPU has all; of every third page alone, "
                       f"{it.extra:.1%} more came than were asked for")
                for what, it in (("read", reads), ("written", writes))
            ),
        ],
    )  # fmt: skip


class AtRandom(NamedTuple):
    """Microseconds a page as it is, and with single pages only; the share of pages that came for nothing."""

    own: float
    alone: float
    extra: float


class _Alone(Streams):
    """Nobody is expected anywhere: every fault brings its page and no other."""

    def window(self, pfn: int) -> Window:
        return Window(1, 1)

    def refaulted(self, pfn: int, filled: int, window: int) -> None:
        pass


def at_random(verb: str) -> AtRandom:
    """Have the vCPU touch every page of a discarded file once, in random order, some times over.

    First quartiles: what else the machine does moves them less than medians.

    :param verb: what it does with a page: ``m`` reads it, ``t`` writes to it.
    """
    order = list(range(RANDOM_PAGES))
    random.Random(2).shuffle(order)
    with tempfile.TemporaryDirectory() as folder, Guest(RANDOM_PAGES) as guest:
        blocks = [block(i) for i in range(RANDOM_PAGES)]
        guest.ram.add_layer(make_layer(Path(folder), blocks))
        ways: list[Streams] = [Streams(), _Alone()]
        times: list[list[float]] = [[], []]
        for number in range(_TIMES):
            lay_out(guest, blocks)
            for at in range(0, RANDOM_PAGES, _CHUNK):
                # Each part of the order is touched the one way and, another time, the other.
                way = (number + at // _CHUNK) % 2
                guest.refaults._streams = ways[way]
                times[way].append(timed(guest, verb, order[at : at + _CHUNK]))
        lay_out(guest, blocks)
        guest.refaults._streams = Streams()
        guest.ram.ledger.counters[Counter.REFAULT_PAGES] = 0
        some = [pfn for pfn in order if pfn % 3 == 0]
        touch(guest, some, verb)
        came = guest.ram.ledger.counters[Counter.REFAULT_PAGES]
        return AtRandom(quantiles(times[0])[0], quantiles(times[1])[0], came / len(some) - 1)


def lay_out(guest: Guest, blocks: list[bytes]) -> None:
    """Have all pages come from the layer, whatever was written to them."""
    guest.epoch = None
    guest.ram.erase(0, guest.ram.pages)
    for pfn, data in enumerate(blocks):
        guest.fill(pfn, data)
    discard(guest)


def timed(guest: Guest, verb: str, order: list[int]) -> float:
    """Microseconds a page until the vCPU has touched all."""
    began = time.perf_counter()
    touch(guest, order, verb)
    return (time.perf_counter() - began) / len(order) * 1e6


def discard(guest: Guest) -> None:
    """Make every page a layer page."""
    guest.run(guest.begin(dict.fromkeys(range(guest.ram.pages), Member.COPY), seconds=60))
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


def touch(guest: Guest, order: list[int], verb: str = "m", *, bare: bool = False) -> list[float]:
    """Have the vCPU touch pages; the seconds each answer took, from the fault being known to its answer."""
    buffer = PageBuffer(1)
    times: list[float] = []
    guest.send(f"{verb} " + " ".join(map(str, order)))
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
