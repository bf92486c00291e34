"""The classification by lanes says what a plain loop over pages says, in both byte orders."""

from __future__ import annotations

import random

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from hva_guest.classify import Flag, classify, count_states, free_bitmap
from hvaqemu.pages import PageAttribute, PageState

F = Flag
CLEAN_FILE = {F.LRU, F.UPTODATE}
CLEAN_SWAP = {F.LRU, F.UPTODATE, F.ANON, F.SWAPCACHE, F.SWAPBACKED}
ALWAYS_PRECIOUS = {
    F.LOCKED, F.ERROR, F.DIRTY, F.SLAB, F.WRITEBACK, F.HUGE, F.UNEVICTABLE, F.HWPOISON, F.NOPAGE, F.KSM, F.OFFLINE,
    F.ZERO_PAGE, F.PGTABLE, F.RESERVED, F.MLOCKED,
}  # fmt: skip


def word(*flags: int) -> int:
    return sum(1 << flag for flag in set(flags))


def reference(words: list[int], swapcache: bool) -> list[int]:
    """What each page is, one page at a time."""
    classes = []
    head_file = head_swap = False
    for value in words:
        flags = {flag for flag in Flag if value >> flag & 1}
        file = swap = unused = False
        if not flags & ALWAYS_PRECIOUS:
            file = flags >= CLEAN_FILE and not flags & {F.BUDDY, F.ANON, F.SWAPCACHE, F.SWAPBACKED}
            swap = flags >= {F.LRU, F.UPTODATE, F.SWAPCACHE, F.SWAPBACKED} and F.BUDDY not in flags
            unused = F.BUDDY in flags and not flags & {
                F.LRU, F.ACTIVE, F.MMAP, F.ANON, F.SWAPCACHE, F.SWAPBACKED, F.COMPOUND_HEAD, F.COMPOUND_TAIL, F.THP,
            }  # fmt: skip
        if F.COMPOUND_TAIL in flags:
            file, swap = file and head_file, swap and head_swap
        else:
            head = F.COMPOUND_HEAD in flags
            head_file, head_swap = head and file, head and swap
        referenced = PageAttribute.REFERENCED if F.REFERENCED in flags else 0
        if unused:
            classes.append(int(PageState.UNUSED))
        elif file:
            classes.append(PageState.VOLATILE | referenced)
        elif swap and swapcache:
            classes.append(PageState.VOLATILE | PageAttribute.SWAPCACHE | referenced)
        else:
            classes.append(int(PageState.STABLE))
    return classes


def packed(words: list[int], byteorder: str) -> bytes:
    return b"".join(value.to_bytes(8, byteorder) for value in words)  # type: ignore[arg-type]


likely = st.sampled_from(
    [word(F.BUDDY), word(*CLEAN_FILE), word(*CLEAN_SWAP), word(*CLEAN_FILE, F.REFERENCED, F.MMAP, F.ACTIVE), 0]
)
twist = st.sampled_from([0] * 8 + [1 << flag for flag in Flag] + [1 << 35, 1 << 63])
compound = st.sampled_from([0, 0, word(F.COMPOUND_HEAD), word(F.COMPOUND_TAIL), word(F.COMPOUND_TAIL)])
plausible = st.builds(lambda base, change, part: (base ^ change) | part, likely, twist, compound)
pages = st.lists(st.one_of(plausible, st.integers(0, (1 << 64) - 1)), min_size=1, max_size=100)


@given(pages, st.sampled_from(["big", "little"]), st.booleans())
@example([word(*CLEAN_FILE, F.COMPOUND_TAIL)], "big", True)
def test_classification_agrees_with_the_loop_over_pages(words: list[int], byteorder: str, swapcache: bool) -> None:
    assert list(classify(packed(words, byteorder), byteorder, swapcache)) == reference(words, swapcache)


@pytest.mark.parametrize("byteorder", ["big", "little"])
def test_long_compound_pages_follow_their_heads(byteorder: str) -> None:
    chance = random.Random(4711)
    words: list[int] = []
    while len(words) < 5000:
        head = word(*CLEAN_FILE, F.COMPOUND_HEAD, *chance.sample([F.DIRTY, F.LOCKED, F.MLOCKED, F.MMAP], 1))
        tails = [word(*CLEAN_FILE, F.COMPOUND_TAIL)] * (2 ** chance.randrange(1, 10) - 1)
        words += [head, *tails]
    assert list(classify(packed(words, byteorder), byteorder)) == reference(words, True)


@pytest.mark.parametrize("flag", sorted(ALWAYS_PRECIOUS))
def test_one_precious_flag_makes_any_page_stable(flag: Flag) -> None:
    words = [word(F.BUDDY, flag), word(*CLEAN_FILE, flag), word(*CLEAN_SWAP, flag)]
    assert list(classify(packed(words, "big"), "big")) == [PageState.STABLE] * 3


@given(st.lists(st.sampled_from([0, 1, 2, 0x12, 0x22, 0x32]), min_size=1, max_size=70).map(bytes))
def test_bitmap_and_totals_say_what_the_map_says(classes: bytes) -> None:
    bitmap = free_bitmap(classes)
    assert len(bitmap) == -(-len(classes) // 8)
    bits = [bitmap[page // 8] >> (7 - page % 8) & 1 for page in range(len(bitmap) * 8)]
    assert bits == [int(value == PageState.UNUSED) for value in classes] + [0] * (len(bits) - len(classes))
    assert count_states(classes) == [sum(value & 15 == state for value in classes) for state in PageState]
