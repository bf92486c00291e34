"""The compressed store against a model: what was put comes back, room is used again, damage is never served."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from hva_host.memory.ledger import entry_granules, entry_place, preserved_entry
from hva_host.memory.slots import GRANULE, PER_PAGE, StoreFull
from hva_host.memory.store import Store, StoreBetrayed
from hvaqemu.pages import PAGE_SIZE

PAGES = 64
LIMIT = PAGES * PAGE_SIZE


class Box:
    """A store, its memfd, and the pages that are in it."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("hva-store")
        self.entries: dict[int, tuple[int, bytes]] = {}
        self.attach()

    def attach(self) -> None:
        """As a new pager: what is in use is what the ledger says."""
        self.store = Store(os.dup(self.fd), PAGES)
        self.store.derive(self.ledger())
        self.store.begin(LIMIT)

    def ledger(self) -> NDArray[np.uint64]:
        found = np.zeros(PAGES, dtype=np.uint64)
        for pfn, (entry, _) in self.entries.items():
            found[pfn] = entry
        return found

    def put(self, pfn: int, page: bytes) -> int:
        entry = self.store.put(memoryview(page))
        if entry:
            self.entries[pfn] = (entry, page)
        return entry

    def drop(self, pfn: int) -> None:
        entry, _ = self.entries.pop(pfn)
        self.store.free(np.array([entry], dtype=np.uint64))

    def check(self) -> None:
        for entry, page in self.entries.values():
            assert got(self.store, entry) == page
        slots = {entry for entry, _ in self.entries.values()}
        taken = [
            place for entry in slots for place in range(entry_place(entry), entry_place(entry) + entry_granules(entry))
        ]
        assert len(taken) == len(set(taken)), "slots overlap"
        pages = {place // PER_PAGE for place in taken}
        assert self.store.used_bytes() == len(pages) * PAGE_SIZE, "pages of the store that nobody uses"

    def close(self) -> None:
        os.close(self.fd)
        os.close(self.store.fd)


def got(store: Store, entry: int) -> bytes:
    into = bytearray(PAGE_SIZE)
    store.get(entry, memoryview(into))
    return bytes(into)


def content(number: int, noise: int = 600) -> bytes:
    """A page that compresses to somewhat more than ``noise`` bytes."""
    page = random.Random(number).randbytes(noise) + b"hva" * 2000
    return page[:PAGE_SIZE]


@pytest.fixture
def box() -> Iterator[Box]:
    found = Box()
    yield found
    found.close()


steps = st.lists(
    st.one_of(
        st.tuples(
            st.just("put"), st.integers(0, PAGES - 1), st.integers(0, 20), st.sampled_from([0, 30, 600, 2000, 2900])
        ),
        st.tuples(st.just("drop"), st.integers(0, PAGES - 1), st.just(0), st.just(0)),
        st.tuples(st.sampled_from(["attach", "begin"]), st.just(0), st.just(0), st.just(0)),
    ),
    max_size=120,
)


@settings(max_examples=200, deadline=None)
@given(steps)
def test_against_a_model(plan: list[tuple[str, int, int, int]]) -> None:
    box = Box()
    try:
        for verb, pfn, number, noise in plan:
            if verb == "put" and pfn not in box.entries:
                assert box.put(pfn, content(number, noise))
            elif verb == "drop" and pfn in box.entries:
                box.drop(pfn)
            elif verb == "attach":
                os.close(box.store.fd)
                box.attach()
            elif verb == "begin":
                box.store.begin(LIMIT)
            box.check()
        for pfn in list(box.entries):
            box.drop(pfn)
        assert box.store.used_bytes() == 0, "all is resident, and the store keeps something"
    finally:
        box.close()


def test_equal_pages_share_a_slot_until_the_last_is_gone(box: Box) -> None:
    assert box.put(1, content(1)) == box.put(2, content(1)) == box.put(3, content(1))
    box.drop(1)
    box.drop(3)
    box.check()
    # A slot freed twice would be taken by another page now.
    box.store.begin(LIMIT)
    box.put(4, content(4))
    box.check()
    box.drop(2)
    assert box.put(5, content(1)) != 0
    box.check()


def test_more_pages_of_a_content_than_can_be_counted(box: Box) -> None:
    entries = [box.store.put(memoryview(content(1))) for _ in range(600)]
    assert len(set(entries)) == 3
    for place, entry in enumerate(entries):
        assert got(box.store, entry) == content(1)
        box.store.free(np.array([entry], dtype=np.uint64))
        assert (box.store.used_bytes() == 0) == (place == 599)


def test_more_uses_in_the_ledger_than_can_be_counted_keep_the_slot() -> None:
    store = Store(os.memfd_create("hva-store"), 1000)
    store.begin(1 << 20)
    entry = store.put(memoryview(content(1)))
    again = Store(os.dup(store.fd), 1000)
    again.derive(np.full(1000, entry, dtype=np.uint64))
    again.free(np.full(999, entry, dtype=np.uint64))
    assert got(again, entry) == content(1)
    os.close(store.fd)
    os.close(again.fd)


def test_noise_is_not_worth_it(box: Box) -> None:
    assert box.put(1, random.Random(1).randbytes(PAGE_SIZE)) == 0
    assert box.store.used_bytes() == 0


def test_the_limit_is_kept_and_freed_room_is_used_again(box: Box) -> None:
    box.store.begin(4 * PAGE_SIZE)
    with pytest.raises(StoreFull, match="limit"):
        for pfn in range(PAGES):
            box.put(pfn, content(pfn, 1000))
    held = len(box.entries)
    assert held == 4 * PER_PAGE // entry_granules(box.entries[0][0])
    assert box.store.used_bytes() == 4 * PAGE_SIZE
    for pfn in (0, 3, 7):
        box.drop(pfn)
    box.store.begin(4 * PAGE_SIZE)
    with pytest.raises(StoreFull):
        for pfn in range(held, PAGES):
            box.put(pfn, content(pfn, 1000))
    assert len(box.entries) == held
    box.check()


def test_a_host_without_memory_for_it(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    box.put(1, content(1))
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", lambda _fd, _data, _offset: 3)
        with pytest.raises(StoreFull, match="no room"):
            box.put(2, content(2))
    box.put(2, content(2))
    box.check()


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 1000), st.binary(min_size=1, max_size=200), st.booleans())
def test_altered_bytes_are_never_served(offset: int, junk: bytes, cut: bool) -> None:
    box = Box()
    try:
        box.put(1, content(1, 800))
        size = os.fstat(box.fd).st_size
        before = os.pread(box.fd, size, 0)
        if cut:
            os.ftruncate(box.fd, min(offset, size))
        else:
            os.pwrite(box.fd, junk, offset)
        entry, page = box.entries[1]
        try:
            assert got(box.store, entry) == page
        except StoreBetrayed:
            assert os.pread(box.fd, size, 0) != before
    finally:
        box.close()


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(3 << 60, (4 << 60) - 1), min_size=1, max_size=40))
def test_a_ledger_of_nonsense(entries: list[int]) -> None:
    """Any PRESERVED entry at all: nothing is served, nothing raised but that, and honest pages are not touched."""
    fd = os.memfd_create("hva-store")
    honest = Store(fd, PAGES)
    honest.begin(LIMIT)
    entry = honest.put(memoryview(content(7)))
    store = Store(os.dup(fd), PAGES)
    try:
        table = np.array([entry, *entries], dtype=np.uint64)
        store.derive(table)
        for wrong in entries:
            if wrong != entry:
                with pytest.raises(StoreBetrayed):
                    got(store, wrong)
        store.begin(LIMIT)
        own = store.put(memoryview(content(8)))
        assert got(store, own) == content(8)
        store.free(table[1:])
        store.free(np.array([own], dtype=np.uint64))
    finally:
        os.close(fd)
        os.close(store.fd)


@pytest.mark.parametrize(
    "frame", [b"\xe0" + b"\xff" * 200, b"\xc0" * 64, b"\x00" * 64, b"", b"\x20\xff" + b"\x00" * 50]
)
def test_a_frame_that_says_how_long_it_is_allocates_nothing(box: Box, frame: bytes) -> None:
    """A compressed length of 2^64 bytes in a frame's header must not be believed."""
    os.pwrite(box.fd, (1).to_bytes(8, "little") + len(frame).to_bytes(2, "little") + frame.ljust(GRANULE * 5), 0)
    with pytest.raises(StoreBetrayed, match="has changed"):
        got(box.store, preserved_entry(0, 4, 1))


def test_content_that_only_looks_alike_is_not_shared(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    """XXH3 is no cryptographic hash: two pages of one checksum are two pages."""
    monkeypatch.setattr("xxhash.xxh3_64_intdigest", lambda _page: 77)
    assert box.put(1, content(1)) != box.put(2, content(2))
    box.check()
