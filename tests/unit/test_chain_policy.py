"""When a disk is frozen, and what is merged into what."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from hva_host.agent.chain_policy import DiskSample, Freeze, freeze, merge_down_to
from hvaqemu.config import FreezeConfig
from hvaqemu.units import GiB, MiB

_CONFIG = FreezeConfig(after=256 * MiB, every=600.0, disk_budget=4 * GiB)


def test_never_without_being_asked_to() -> None:
    assert freeze(DiskSample(written=1 << 50, since=None), FreezeConfig(), 0) is Freeze.NO


def test_after_so_much() -> None:
    assert freeze(DiskSample(256 * MiB - 1, None), _CONFIG, 0) is Freeze.NO
    assert freeze(DiskSample(256 * MiB, None), _CONFIG, 0) is Freeze.NOW


def test_at_most_so_often() -> None:
    assert freeze(DiskSample(GiB, 599.0), _CONFIG, 0) is Freeze.NO
    assert freeze(DiskSample(GiB, 600.0), _CONFIG, 0) is Freeze.NOW


def test_within_the_budget_what_is_written_next_included() -> None:
    assert freeze(DiskSample(GiB, None), _CONFIG, 4 * GiB - 256 * MiB) is Freeze.NOW
    assert freeze(DiskSample(GiB, None), _CONFIG, 4 * GiB - 256 * MiB + 1) is Freeze.BUDGET


def test_no_budget_is_told_of_where_nothing_is_due() -> None:
    assert freeze(DiskSample(0, None), _CONFIG, 1 << 50) is Freeze.NO


_SIZES = st.lists(st.integers(0, 1 << 40), max_size=20)


@given(_SIZES, st.integers(1, 16))
def test_a_merge_makes_the_chain_short_enough(sizes: list[int], depth: int) -> None:
    place = merge_down_to(sizes, depth)
    if len(sizes) <= depth:
        assert place is None
    else:
        assert place is not None
        # At least one file above it goes, and what is left is within the bound.
        assert 0 <= place < len(sizes) - 1
        assert place + 1 <= depth


def test_small_files_are_not_merged_into_a_large_one() -> None:
    assert merge_down_to([1000, 10, 8, 6], 3) == 1
    assert merge_down_to([1000, 400, 300, 6], 3) == 0


def test_nothing_fits_but_the_bound_does() -> None:
    assert merge_down_to([1000, 100, 10, 1], 3) == 2
    assert merge_down_to([1000, 100, 10, 1], 1) == 0


@given(st.integers(1, 8), st.integers(10, 200))
def test_a_byte_is_moved_a_logarithmic_number_of_times(depth: int, freezes: int) -> None:
    """Pieces of one size, one after the other: what is rewritten per byte frozen grows slower than the chain would."""
    sizes: list[int] = []
    moved = 0
    for _ in range(freezes):
        sizes.append(1)
        place = merge_down_to(sizes, depth)
        if place is not None:
            moved += sum(sizes[place + 1 :])
            sizes[place:] = [sum(sizes[place:])]
    # The files above are what is written; the target's own bytes stay where they are.
    assert moved <= freezes * (freezes.bit_length() + 1)
    assert len(sizes) <= depth
