"""How fast memory goes, and what is made of it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hva_host.policy.falling import UNSEEN, Falling, Falls
from hva_host.policy.rungs import URGENT_RUNG
from hva_host.policy.samples import Cgroup, HostSample, Limits, Look
from hva_host.policy.shortage import Need, need
from hvaqemu.units import GiB, MiB
from tests.unit.policy_samples import HOST, VM

KEPT = Limits(available_bytes=GiB)


def seen(*points: tuple[float, int], of: int = 8 * GiB) -> Falling:
    found = Falling()
    for at_s, left in points:
        found = found.seen(of, at_s, left)
    return found


def wanted(host: HostSample, falls: Falls) -> Need:
    return need(Look(host, (VM,)), host, KEPT, pressed=False, falls=falls)


def test_one_look_tells_nothing() -> None:
    assert seen((100.0, GiB)).per_s == 0


def test_what_goes_on_is_believed() -> None:
    steady = seen(*((float(at), 4 * GiB - at * 50 * MiB) for at in range(20)))
    assert steady.per_s == pytest.approx(50 * MiB, rel=0.01)


def test_what_is_taken_at_once_does_not_go_on() -> None:
    assert seen((0.0, 4 * GiB), (1.0, 4 * GiB), (2.0, GiB)).per_s == 0
    assert seen((0.0, 4 * GiB), (1.0, 4 * GiB - 10 * MiB), (2.0, GiB), (3.0, GiB - 10 * MiB)).per_s < 10 * MiB


def test_what_grows_does_not_fall() -> None:
    assert seen((0.0, GiB), (1.0, GiB + MiB), (2.0, 2 * GiB)).per_s == 0


def test_looks_far_apart_or_of_another_group_tell_nothing() -> None:
    assert seen((0.0, 4 * GiB), (60.0, GiB)).per_s == 0
    assert seen((0.0, 4 * GiB)).seen(2 * GiB, 1.0, GiB).per_s == 0


def test_the_same_look_twice_changes_nothing() -> None:
    falling = seen((0.0, 4 * GiB), (1.0, 3 * GiB))
    assert falling.seen(8 * GiB, 1.0, 3 * GiB) == falling


def test_what_will_be_an_emergency_is_taken_ahead_and_no_further_than_caches() -> None:
    host = replace(HOST, available_bytes=1500 * MiB)
    assert wanted(host, UNSEEN) == Need()
    assert wanted(host, Falls(Falling(host.total_bytes, host.at_s, host.available_bytes, 100 * MiB))) == Need()
    found = wanted(host, Falls(Falling(host.total_bytes, host.at_s, host.available_bytes, 300 * MiB)))
    assert (found.missing, found.urgent, found.short) == (2 * GiB, True, False)
    assert found.highest == URGENT_RUNG
    assert "the host has 1.5 GiB left, and loses 300.0 MiB a second" in found.reason


def test_a_group_falls_too() -> None:
    group = Cgroup(limit_bytes=GiB, usage_bytes=800 * MiB)
    host = replace(HOST, cgroup=group)
    falls = UNSEEN
    for at_s, used in ((98.0, 400), (99.0, 600), (100.0, 800)):
        falls = falls.seen(replace(host, at_s=at_s, cgroup=replace(group, usage_bytes=used * MiB)))
    assert falls.group.left == 224 * MiB
    found = wanted(host, falls)
    assert found.urgent
    assert "the VMs' cgroup has 224.0 MiB left, and loses" in found.reason


@given(st.lists(st.tuples(st.floats(0.1, 100), st.integers(0, 16 * GiB)), max_size=20))
def test_it_is_never_said_to_fall_faster_than_it_was_seen_to(steps: list[tuple[float, int]]) -> None:
    now, falling, fastest = 0.0, Falling(), 0.0
    for elapsed, left in steps:
        now += elapsed
        if falling.of:
            fastest = max(fastest, (falling.left - left) / elapsed)
        falling = falling.seen(16 * GiB, now, left)
        assert 0 <= falling.per_s <= fastest + 1
