"""docs/pages.md says what the classification does, flag by flag."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from hva_guest.classify import Flag, classify
from hvaqemu.pages import PageAttribute, PageState

_TABLE = Path(__file__).parents[2] / "docs" / "pages.md"
_ROW = re.compile(r"^\| ([A-Z_]+) \| ([^|]+) \|", re.MULTILINE)
EFFECTS = {name: effect.strip() for name, effect in _ROW.findall(_TABLE.read_text())}

FILE = {Flag.LRU, Flag.UPTODATE}
SWAP = {*FILE, Flag.ANON, Flag.SWAPCACHE, Flag.SWAPBACKED}
FREE = {Flag.BUDDY}


def state(flags: set[Flag]) -> PageState:
    """What a single page with these flags is; a tail gets a head before it that is a clean file page."""
    words = [flags] if Flag.COMPOUND_TAIL not in flags else [FILE | {Flag.COMPOUND_HEAD}, flags]
    data = b"".join(sum(1 << flag for flag in each).to_bytes(8, "big") for each in words)
    return PageState(classify(data, "big")[-1] & 0x0F)


def test_every_flag_has_a_row_and_every_row_a_flag() -> None:
    assert set(EFFECTS) == {flag.name for flag in Flag}


@pytest.mark.parametrize("flag", Flag, ids=lambda flag: flag.name)
def test_a_flag_does_what_its_row_says(flag: Flag) -> None:
    effect = EFFECTS[flag.name]
    as_file, as_swap, as_free = state(FILE | {flag}), state(SWAP | {flag}), state(FREE | {flag})
    if effect == "keeps":
        assert as_file == as_swap == as_free == PageState.STABLE
        return
    assert (as_free is PageState.STABLE) == ("not free" in effect)
    not_a_file = re.search(r"not VOLATILE( as a file page|$)|not VOLATILE unless in the swap cache", effect)
    assert (as_file is PageState.STABLE) == bool(not_a_file)
    assert (as_swap is PageState.VOLATILE) == (flag is not Flag.BUDDY and flag is not Flag.COMPOUND_TAIL)
    if "demands it" in effect:
        wanted, without = (PageState.UNUSED, FREE) if "UNUSED demands" in effect else (PageState.VOLATILE, FILE)
        assert state(without) is wanted
        assert state(without - {flag}) is PageState.STABLE


def test_a_tail_is_what_its_head_is() -> None:
    tail = FILE | {Flag.COMPOUND_TAIL}
    for head, wanted in ((FILE, PageState.VOLATILE), (FILE | {Flag.DIRTY}, PageState.STABLE)):
        words = [head | {Flag.COMPOUND_HEAD}, tail]
        data = b"".join(sum(1 << flag for flag in each).to_bytes(8, "big") for each in words)
        assert classify(data, "big")[1] & 0x0F == wanted


def test_referenced_is_an_attribute() -> None:
    word = sum(1 << flag for flag in FILE | {Flag.REFERENCED}).to_bytes(8, "big")
    assert classify(word, "big")[0] == PageState.VOLATILE | PageAttribute.REFERENCED
