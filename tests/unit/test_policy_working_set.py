"""What a guest uses, in pages."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hva_host.policy.samples import Report
from hva_host.policy.working_set import estimate, resident_unused, smoothed
from hvaqemu.units import MiB
from tests.unit.policy_samples import MEG, VM


def test_nothing_is_known_of_a_guest_that_never_reported() -> None:
    assert estimate(replace(VM, report=None)) is None
    assert resident_unused(replace(VM, report=None)) == 0


def test_what_is_not_free_counts_as_used() -> None:
    assert estimate(VM) == 300 * MEG


def test_discarded_free_pages_do_not_occupy_anything() -> None:
    sample = replace(VM, zero_pages=60 * MEG, backing_bytes=340 * MiB)
    assert resident_unused(sample) == 40 * MEG
    assert estimate(sample) == 300 * MEG
    assert resident_unused(replace(sample, zero_pages=500 * MEG)) == 0


def test_what_is_cold_is_not_used() -> None:
    sample = replace(VM, cold_pages=150 * MEG)
    assert estimate(sample) == 150 * MEG
    # As the cold ones go, nothing changes.
    gone = replace(sample, cold_pages=50 * MEG, layer_pages=100 * MEG, backing_bytes=300 * MiB)
    assert estimate(gone) == 150 * MEG
    # What came back is used.
    assert estimate(replace(gone, layer_pages=0, backing_bytes=400 * MiB)) == 250 * MEG


pages = st.integers(0, 512 * MEG)


@given(pages, pages, pages, pages, st.integers(0, 512 * MiB))
def test_it_is_never_more_than_what_is_resident(unused: int, zero: int, layer: int, cold: int, backing: int) -> None:
    sample = replace(
        VM,
        backing_bytes=backing,
        zero_pages=zero,
        layer_pages=layer,
        report=Report(0.0, unused, 0, 0, 0),
        cold_pages=cold,
    )
    found = estimate(sample)
    assert found is not None
    assert 0 <= found <= backing >> 12


def test_it_follows_within_minutes() -> None:
    assert smoothed(None, None, 1.0) is None
    assert smoothed(None, 100, 1.0) == 100
    assert smoothed(50.0, None, 1.0) == 50
    assert smoothed(0.0, 100, 60.0) == pytest.approx(63.2, abs=0.1)
    assert smoothed(100.0, 0, 600.0) == pytest.approx(0, abs=0.01)
