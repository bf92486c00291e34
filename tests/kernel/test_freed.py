"""Discarded pages the guest has freed become ZERO: only on scans begun after the entry, only while absent."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hva_host.memory.layers import Layer
from hva_host.memory.ledger import Counter
from hva_host.memory.waiting import NotCached
from hva_host.pager.epoch import Epoch, Phase, Step
from hva_host.pager.membership import Member
from hva_host.pager.restore import restore
from hvaqemu.pages import Residence, Run
from tests.kernel.harness import PAGE, PAGES, ZERO, Guest, crc, make_layer, soft

_PAGES = 16


@pytest.fixture
def in_layer(cold_guest: Guest, tmp_path: Path) -> Guest:
    """Pages 0 to 15 come back from a layer."""
    cold_guest.ram.add_layer(make_layer(tmp_path, [soft(i) for i in range(_PAGES)]))
    discard(cold_guest, Residence.LAYER)
    return cold_guest


@pytest.fixture
def in_store(cold_guest: Guest) -> Guest:
    """They come back from the store."""
    discard(cold_guest, Residence.PRESERVED)
    return cold_guest


@pytest.fixture(params=["in_layer", "in_store"])
def discarded(request: pytest.FixtureRequest) -> Guest:
    """They come back from the one or the other."""
    found = request.getfixturevalue(request.param)
    assert isinstance(found, Guest)
    return found


def discard(guest: Guest, kind: Residence, content: Callable[[int], bytes] = soft) -> None:
    for pfn in range(_PAGES):
        guest.fill(pfn, content(pfn))
    guest.run(guest.begin(dict.fromkeys(range(_PAGES), Member.STABLE)))
    assert kinds(guest) == [kind] * _PAGES


def kinds(guest: Guest) -> list[int]:
    return [int(kind) for kind in guest.ram.ledger.kinds(slice(0, _PAGES))]


def begin(guest: Guest, pfns: Iterator[int] | list[int] | range) -> Epoch:
    """An epoch after a report that said these pages are free."""
    return guest.begin(dict.fromkeys(pfns, Member.UNUSED), seconds=0.5)


def to(phase: Phase, epoch: Epoch) -> Iterator[Step]:
    """The steps of an epoch that has come to a phase."""
    steps = epoch.steps()
    for _ in steps:
        if epoch.phase is phase:
            return steps
    raise AssertionError(f"the epoch never was {phase}")


def scan(*free: int) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    found = np.zeros(PAGES, dtype=np.bool_)
    found[list(free)] = True
    return found


def finish(steps: Iterator[Step]) -> None:
    for _ in steps:
        pass


def test_a_page_free_in_two_scans_becomes_zero(discarded: Guest) -> None:
    guest = discarded
    kind = kinds(guest)[0]
    epoch = begin(guest, range(_PAGES))
    steps = to(Phase.CONFIRMING, epoch)
    assert epoch.wants_confirmation()
    assert epoch.confirm(epoch.identifier, 1, scan(1, 2, 3))
    assert kinds(guest) == [kind] * _PAGES
    assert epoch.confirm(epoch.identifier, 2, scan(2, 3, 4))
    finish(steps)
    assert [pfn for pfn, kind in enumerate(kinds(guest)) if kind == Residence.ZERO] == [2, 3]
    assert epoch.counts["freed"] == 2
    assert epoch.counts["candidates"] == epoch.counts["discarded_zero"] == epoch.counts["touched"] == 0
    assert guest.ram.ledger.counters[Counter.FREED_PAGES] == 2
    totals = guest.ram.ledger.totals()
    guest.ram.ledger.count_totals()
    assert guest.ram.ledger.totals() == totals
    loaded = guest.ram.ledger.counters[Counter.LAYER_PAGES_LOADED]
    assert guest.checksum(2) == crc(ZERO)
    assert guest.ram.ledger.counters[Counter.LAYER_PAGES_LOADED] == loaded
    assert guest.checksum(3) == crc(ZERO)
    assert [guest.checksum(pfn) for pfn in (1, 4, 9)] == [crc(soft(pfn)) for pfn in (1, 4, 9)]
    assert (guest.ram.ledger.counters[Counter.LAYER_PAGES_LOADED] > loaded) == (kind == Residence.LAYER)


def test_the_store_keeps_a_slot_until_its_last_page_is_freed(cold_guest: Guest) -> None:
    guest = cold_guest
    discard(guest, Residence.PRESERVED, lambda pfn: soft(pfn % 2))
    assert guest.ram.store.used_bytes() == PAGE
    # All of one content but the last, which is read; the other content stays.
    for freed in ([0, 2, 4], [6, 8, 10, 12]):
        epoch = begin(guest, freed)
        guest.run(epoch)
        assert epoch.counts["freed"] == len(freed)
    # What was given back twice would be another page's now.
    for pfn in range(20, 40):
        guest.fill(pfn, soft(pfn))
    guest.run(guest.begin(dict.fromkeys(range(20, 40), Member.STABLE)))
    assert guest.checksum(14) == crc(soft(0))
    assert [guest.checksum(pfn) for pfn in (0, 12)] == [crc(ZERO)] * 2
    guest.run(begin(guest, range(1, 16, 2)))
    assert [guest.checksum(pfn) for pfn in range(20, 40)] == [crc(soft(pfn)) for pfn in range(20, 40)]
    assert guest.ram.store.used_bytes() == 0, "a slot that no page needs"
    assert guest.ram.ledger.preserved == 0


def test_nothing_is_turned_on_a_report_or_on_one_scan(discarded: Guest) -> None:
    guest = discarded
    before = kinds(guest)
    earlier = begin(guest, range(_PAGES))
    guest.run(earlier, confirm=False)
    assert "did not confirm" in earlier.note
    epoch = begin(guest, range(_PAGES))
    steps = to(Phase.CONFIRMING, epoch)
    everything = scan(*range(PAGES))
    assert not epoch.confirm(earlier.identifier, 1, everything)
    assert not epoch.confirm(os.urandom(16), 1, everything)
    assert epoch.confirm(epoch.identifier, 1, everything)
    assert not epoch.confirm(epoch.identifier, 1, everything)
    finish(steps)
    assert kinds(guest) == before
    assert epoch.counts["freed"] == 0
    # Not reported free, whatever the scans say.
    epoch = begin(guest, [PAGES - 1])
    guest.run(epoch)
    assert kinds(guest) == before


@pytest.mark.parametrize("phase", [Phase.PROVING, Phase.CONFIRMING])
def test_a_page_touched_in_between_keeps_its_bytes(discarded: Guest, phase: Phase) -> None:
    """Present wins: it left when it was filled, and stays out even when it is gone again."""
    guest = discarded
    guest.write(40, "something to protect")
    epoch = guest.begin({**dict.fromkeys(range(_PAGES), Member.UNUSED), 40: Member.COPY})
    steps = to(phase, epoch)
    if phase is Phase.PROVING:
        assert epoch.identifier, "noted before"
    guest.write(5, "used-again")
    guest.confirm_all(epoch)
    finish(steps)
    assert kinds(guest)[5] == Residence.RESIDENT
    assert guest.checksum(5) == crc(b"used-again" + soft(5)[10:])
    assert kinds(guest)[15] == Residence.ZERO


def test_an_entry_made_after_the_scans_began_is_not_turned(in_layer: Guest) -> None:
    """Came back, and was discarded again, all while the scans of this epoch were under way."""
    guest = in_layer
    epoch = begin(guest, range(_PAGES))
    steps = to(Phase.CONFIRMING, epoch)
    guest.confirm_all(epoch)
    assert guest.checksum(7) == crc(soft(7))
    entry = np.array([guest.ram.ledger.entries[15] - np.uint64(8)], dtype=np.uint64)
    guest.ram.discard(np.array([7]), entry, [Run(7, 1)])
    finish(steps)
    assert kinds(guest)[7] == Residence.LAYER
    assert kinds(guest)[15] == Residence.ZERO
    assert guest.checksum(7) == crc(soft(7))


def test_a_fetch_under_way_brings_no_old_bytes(in_layer: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    guest = in_layer
    read, go_on = Layer.read, threading.Event()

    def slow(layer: Layer, block: int, count: int, into: memoryview, *, wait: bool) -> None:
        if not wait:
            raise NotCached
        assert go_on.wait(10)
        read(layer, block, count, into, wait=True)

    monkeypatch.setattr(Layer, "read", slow)
    guest.send("w 6 fresh")
    deadline = time.monotonic() + 10
    while not guest.fetcher.under_way:
        guest.serve()
        assert time.monotonic() < deadline
    epoch = begin(guest, range(_PAGES))
    guest.run(epoch)
    assert kinds(guest)[6] == Residence.ZERO
    go_on.set()
    assert guest.reply() == "ok"
    monkeypatch.undo()
    assert guest.checksum(6) == crc(b"fresh" + ZERO[5:])


def test_an_abandoned_epoch_turns_nothing(discarded: Guest) -> None:
    guest = discarded
    before = kinds(guest)
    epoch = begin(guest, range(_PAGES))
    steps = to(Phase.CONFIRMING, epoch)
    guest.confirm_all(epoch)
    epoch.abandon("why not")
    finish(steps)
    assert kinds(guest) == before


def test_a_restore_brings_zeros_for_what_was_turned(discarded: Guest) -> None:
    guest = discarded
    guest.run(begin(guest, range(8)))
    guest.epoch = None
    for _ in restore(guest.ram, guest.refaults, guest.fetcher):
        for result in guest.fetcher.results():
            guest.refaults.fetched(result)
    assert kinds(guest) == [Residence.RESIDENT] * _PAGES
    assert [guest.checksum(pfn) for pfn in range(8)] == [crc(ZERO)] * 8
    assert [guest.checksum(pfn) for pfn in range(8, _PAGES)] == [crc(soft(pfn)) for pfn in range(8, _PAGES)]


actions = st.lists(
    st.tuples(st.sampled_from(["read", "write", "free", "allocate", "allocate and write", "none"]), st.integers(0, 15)),
    min_size=6,
    max_size=40,
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    plan=actions,
    free=st.lists(st.sampled_from([True, True, False]), min_size=_PAGES, max_size=_PAGES),
    slice_pages=st.sampled_from([1, 3, 512]),
    kind=st.sampled_from([Residence.LAYER, Residence.PRESERVED]),
)
def test_no_interleaving_changes_a_byte_that_matters(
    cold_guest: Guest,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    plan: list[tuple[str, int]],
    free: list[bool],
    slice_pages: int,
    kind: Residence,
) -> None:
    """A guest that frees, allocates, writes and reads at every point where the pager gives way.

    It reads only what it has written since it allocated the page, or what it never freed.
    """
    guest = cold_guest

    def first(pfn: int) -> bytes:
        # What is paged out is not what the layer holds, and some of it is alike.
        return soft(pfn) if kind is Residence.LAYER else soft(100 + pfn // 2)

    if not guest.ram.layers:
        guest.ram.add_layer(make_layer(tmp_path_factory.mktemp("layer"), [soft(i) for i in range(_PAGES)]))
    monkeypatch.setattr("hva_host.pager.freed._CHUNK_PAGES", slice_pages)
    guest.epoch = None
    guest.ram.backing.punch(Run(0, PAGES))
    guest.ram.erase(0, guest.ram.pages)
    discard(guest, kind, first)
    #: None: not known, because it was free since it was written.
    model: list[bytes | None] = [None if free[pfn] else first(pfn) for pfn in range(_PAGES)]
    free = list(free)
    epoch = begin(guest, range(_PAGES))
    plan = list(plan)

    def act() -> None:
        verb, pfn = plan.pop() if plan else ("none", 0)
        if verb == "read":
            found = guest.checksum(pfn)
            assert model[pfn] is None or found == crc(model[pfn] or b"")
        elif verb == "free":
            free[pfn], model[pfn] = True, None
        elif verb.startswith("allocate") and free[pfn]:
            free[pfn] = False
        if verb.endswith("write") and not free[pfn]:
            # As a whole, as a kernel does that allocates a page, or in part if it knows the rest.
            text = f"w{len(plan):03}"
            known = model[pfn]
            if known is None:
                text *= PAGE // len(text)
            guest.write(pfn, text)
            model[pfn] = text.encode() + (known or b"")[len(text) :]

    rounds = 0
    for _ in epoch.steps():
        act()
        if epoch.identifier and rounds < 2:
            rounds += 1
            epoch.confirm(epoch.identifier, rounds, scan(*(pfn for pfn in range(_PAGES) if free[pfn])))
            act()
    while plan:
        act()
    for pfn, known in enumerate(model):
        if known is not None:
            assert guest.checksum(pfn) == crc(known), pfn
    for pfn in range(_PAGES):
        guest.checksum(pfn)
    assert guest.ram.store.used_bytes() == 0, "a slot that no page needs"
