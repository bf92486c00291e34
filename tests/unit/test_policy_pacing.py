"""How large steps may be, and how far apart."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hva_host.policy.pacing import (
    GUEST_SHARE_STEPPING,
    INTERVAL_LEAST,
    gap_after_scan,
    gap_after_step,
    step_least,
    step_most,
)
from hvaqemu.reclaim_config import ReclaimState
from hvaqemu.units import GiB, MiB
from tests.unit.policy_samples import VM, epoch, outcome

BOTH = (ReclaimState.UNUSED, ReclaimState.VOLATILE)


def test_scans_stay_within_their_share_of_the_guest() -> None:
    sample = replace(VM, epoch=epoch(1, scan_s=0.043))
    assert gap_after_step(sample, outcome(0), 0.05) == pytest.approx(0.043 / 0.02)
    assert gap_after_step(sample, outcome(0, states=BOTH), 0.05) == pytest.approx(3 * 0.043 / 0.02)
    assert gap_after_scan(sample) == pytest.approx(8.6)
    assert gap_after_scan(VM) == 0


def test_epochs_stay_within_the_cpu_limit() -> None:
    sample = replace(VM, epoch=epoch(1, scan_s=0.001), pager_cpu_s=3.0)
    assert gap_after_step(sample, outcome(0, pager_cpu_s=2.0), 0.05) == pytest.approx(20.0)
    assert gap_after_step(sample, outcome(0, pager_cpu_s=2.0), 0.5) == pytest.approx(INTERVAL_LEAST)


def test_a_pager_that_was_replaced_used_nothing() -> None:
    sample = replace(VM, epoch=epoch(1), pager_cpu_s=0.0)
    assert gap_after_step(sample, outcome(0, pager_cpu_s=100.0), 0.05) == INTERVAL_LEAST


@given(st.floats(0, 10), st.floats(0, 100), st.floats(0.001, 1))
def test_in_the_long_run_neither_is_exceeded(scan_s: float, cpu_s: float, limit: float) -> None:
    sample = replace(VM, epoch=epoch(1, scan_s=scan_s), pager_cpu_s=cpu_s)
    gap = gap_after_step(sample, outcome(0, states=BOTH), limit)
    assert gap >= INTERVAL_LEAST
    assert 3 * scan_s <= GUEST_SHARE_STEPPING * gap * 1.000001
    assert cpu_s <= limit * gap * 1.000001


@given(st.integers(128, 1 << 20))
def test_steps_are_bounded(memory: int) -> None:
    sample = replace(VM, memory_bytes=memory * MiB)
    assert 256 <= step_least(sample) <= step_most(sample) <= (memory * MiB >> 12) // 8


def test_the_smallest_step_of_a_large_guest() -> None:
    assert step_least(VM) == 256
    assert step_least(replace(VM, memory_bytes=16 * GiB)) == 8192
