"""Words of /proc/kpageflags become page states, without a Python loop over pages.

A word has 64 flag bits; the five bytes that matter of each word form five *lanes*. Every lane is translated to a byte
of *verdicts* a page ("as far as this lane goes it may be UNUSED, a file copy, a swap copy"), and the lanes' verdicts
are ANDed as one big integer. Flag numbers: include/uapi/linux/kernel-page-flags.h and, from 32 on,
include/linux/kernel-page-flags.h; their meaning: fs/proc/page.c and Documentation/admin-guide/mm/pagemap.rst.
"""

from __future__ import annotations

import enum

from hvaqemu.pages import STATE_MASK, PageAttribute, PageState


class Flag(enum.IntEnum):
    """Bit numbers in a word of /proc/kpageflags."""

    LOCKED = 0
    ERROR = 1
    REFERENCED = 2
    UPTODATE = 3
    DIRTY = 4
    LRU = 5
    ACTIVE = 6
    SLAB = 7
    WRITEBACK = 8
    RECLAIM = 9
    BUDDY = 10
    MMAP = 11
    ANON = 12
    SWAPCACHE = 13
    SWAPBACKED = 14
    COMPOUND_HEAD = 15
    COMPOUND_TAIL = 16
    HUGE = 17
    UNEVICTABLE = 18
    HWPOISON = 19
    NOPAGE = 20
    KSM = 21
    THP = 22
    OFFLINE = 23
    ZERO_PAGE = 24
    IDLE = 25
    PGTABLE = 26
    RESERVED = 32
    MLOCKED = 33


_F = Flag
#: Whatever else a page is, with one of these its content matters (or it has none that is ours to judge).
_PRECIOUS = {
    _F.LOCKED, _F.ERROR, _F.DIRTY, _F.SLAB, _F.WRITEBACK, _F.HUGE, _F.UNEVICTABLE, _F.HWPOISON, _F.NOPAGE, _F.KSM,
    _F.OFFLINE, _F.ZERO_PAGE, _F.PGTABLE, _F.RESERVED, _F.MLOCKED,
}  # fmt: skip
_IN_USE = {
    _F.LRU, _F.ACTIVE, _F.MMAP, _F.ANON, _F.SWAPCACHE, _F.SWAPBACKED, _F.COMPOUND_HEAD, _F.COMPOUND_TAIL, _F.THP,
}  # fmt: skip

_UNUSED, _FILE, _SWAP, _REFERENCED = 1, 2, 4, 8
_COPIES = _FILE | _SWAP
#: verdict: (flags it demands, flags it excludes)
_RULES = {
    _UNUSED: ({_F.BUDDY}, _PRECIOUS | _IN_USE),
    _FILE: ({_F.LRU, _F.UPTODATE}, _PRECIOUS | {_F.BUDDY, _F.ANON, _F.SWAPCACHE, _F.SWAPBACKED}),
    # The kernel names a page SWAPCACHE only together with SWAPBACKED; alone the bit is a file system's own.
    _SWAP: ({_F.LRU, _F.UPTODATE, _F.SWAPCACHE, _F.SWAPBACKED}, _PRECIOUS | {_F.BUDDY}),
    _REFERENCED: ({_F.REFERENCED}, set()),
}
_LANES = 5


def _lane_mask(flags: set[Flag], lane: int) -> int:
    return sum(1 << (flag - 8 * lane) for flag in flags if 0 <= flag - 8 * lane < 8)


def _lane_table(lane: int) -> bytes:
    """The verdicts one byte of flags leaves open, for each of its 256 values."""
    table = bytearray(256)
    for verdict, (demanded, excluded) in _RULES.items():
        need, never = _lane_mask(demanded, lane), _lane_mask(excluded, lane)
        for value in range(256):
            if value & need == need and not value & never:
                table[value] |= verdict
    return bytes(table)


def _class_table(swapcache: bool) -> bytes:
    """The class-map byte of each combination of verdicts."""
    table = bytearray(256)
    for verdict in range(16):
        value = int(PageState.STABLE)
        if verdict & _UNUSED:
            value = PageState.UNUSED
        elif verdict & _FILE:
            value = PageState.VOLATILE
        elif verdict & _SWAP and swapcache:
            value = PageState.VOLATILE | PageAttribute.SWAPCACHE
        if value & PageState.VOLATILE and verdict & _REFERENCED:
            value |= PageAttribute.REFERENCED
        table[verdict] = value
    return bytes(table)


_LANE_TABLES = tuple(_lane_table(lane) for lane in range(_LANES))
_CLASS_TABLES = {swapcache: _class_table(swapcache) for swapcache in (False, True)}
#: Both copy verdicts where the byte of lane 1 says head, of lane 2 says tail, and nothing elsewhere.
_HEADS = bytes(_COPIES if value & 0x80 else 0 for value in range(256))
_TAILS = bytes(_COPIES if value & 0x01 else 0 for value in range(256))
_STATES = bytes(value & STATE_MASK for value in range(256))
#: 1 for VOLATILE pages of files.
_FILES = bytes(
    value | PageAttribute.REFERENCED == PageState.VOLATILE | PageAttribute.REFERENCED for value in range(256)
)
#: "Free" as a binary digit, for :func:`free_bitmap`.
_DIGITS = bytes(b"01"[value & STATE_MASK == PageState.UNUSED] for value in range(256))


def classify(words: bytes, byteorder: str, swapcache: bool = True) -> bytes:
    """One class-map byte for each 8-byte word of ``words``, which are in ``byteorder`` ("big" or "little").

    ``words`` should begin where no compound page straddles: tails whose head is not in it are STABLE.
    """
    pages = len(words) // 8
    lanes = [words[7 - lane :: 8] if byteorder == "big" else words[lane::8] for lane in range(_LANES)]
    verdicts = int.from_bytes(lanes[0].translate(_LANE_TABLES[0]), "big")
    for lane in range(1, _LANES):
        verdicts &= int.from_bytes(lanes[lane].translate(_LANE_TABLES[lane]), "big")
    tails = int.from_bytes(lanes[2].translate(_TAILS), "big")
    if verdicts & tails:
        heads = int.from_bytes(lanes[1].translate(_HEADS), "big")
        verdicts &= ~_refused_by_head(verdicts, heads, tails, pages)
    return verdicts.to_bytes(pages, "big").translate(_CLASS_TABLES[swapcache])


def _refused_by_head(verdicts: int, heads: int, tails: int, pages: int) -> int:
    """The copy verdicts that tails must give up, because the head before them, if any, does not have them.

    A tail shows its head's DIRTY, LOCKED and MLOCKED flags only on some kernels. All integers hold a byte a page, first
    page highest; the refusals spread rightwards through runs of tails, twice as far in each step.
    """
    everywhere = int.from_bytes(bytes((_COPIES,)) * pages, "big")
    refused = everywhere & ~tails & ~(heads & verdicts)
    # Tails at the very beginning have lost their head.
    refused |= tails & (_COPIES << 8 * (pages - 1))
    spread = tails
    distance = 8
    while spread:
        refused |= spread & (refused >> distance)
        spread &= spread >> distance
        distance *= 2
    return refused & tails


def with_potential(classes: bytes, mapped: bytes) -> bytes:
    """The class map in which file copies that ``mapped`` marks with 1 (else 0) are POTENTIAL; both a byte a page."""
    # VOLATILE and POTENTIAL differ in the lowest bit.
    files = int.from_bytes(classes.translate(_FILES), "big")
    found = int.from_bytes(classes, "big") | files & int.from_bytes(mapped, "big")
    return found.to_bytes(len(classes), "big")


def free_bitmap(classes: bytes) -> bytes:
    """A bit for each page of ``classes`` (not empty), first page in the highest bit; 1 is UNUSED; padded with 0."""
    padding = -len(classes) % 8
    digits = classes.translate(_DIGITS) + b"0" * padding
    return int(digits, 2).to_bytes(len(digits) // 8, "big")


def count_states(classes: bytes) -> list[int]:
    """Pages in each :class:`PageState` of a class map."""
    states = classes.translate(_STATES)
    others = [states.count(state) for state in PageState if state != PageState.STABLE]
    return [len(classes) - sum(others), *others]
