"""What policy saw of a real guest with phases (``python -m benchmarks phases``), decided on again."""

from __future__ import annotations

import gzip
import itertools
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from hva_host.policy import pacing, trace
from hva_host.policy.decisions import Decisions
from hva_host.policy.judge import STALE_SECONDS
from hva_host.policy.trace import Recorded
from hvaqemu.units import MiB
from tests.policy.curves import turns
from tests.unit.policy_samples import config, limits

_TRACE = Path(__file__).parent.parent / "policy/phases.jsonl.gz"
_LIMITS = limits({"phases": config(mode="proactive", refault_budget="1%/min")})
_PHASES = 5


@cache
def recorded() -> list[Recorded]:
    with gzip.open(_TRACE, "rt") as file:
        return list(trace.load(file, _TRACE.name))


def decided(looks: list[Recorded]) -> list[tuple[Recorded, Decisions]]:
    return list(trace.replay(looks, _LIMITS))


def test_it_is_of_a_whole_run() -> None:
    looks = recorded()
    assert looks[-1].now - looks[0].now > 300
    assert all(0 < later.now - now.now < STALE_SECONDS for now, later in itertools.pairwise(looks))
    backing = [each.look.vms[0].backing_bytes for each in looks]
    assert max(backing) > 3 * min(backing)
    assert turns(backing, 16 * MiB) <= 2 * _PHASES


def test_steps_are_bounded_and_wait_for_one_another_and_for_the_budget() -> None:
    stepped, paused, steps = -pacing.INTERVAL_LEAST, False, 0
    for look, decisions in decided(recorded()):
        (view,) = decisions.views
        if view.refault_rate is not None and view.budget is not None:
            above = view.refault_rate > view.budget
            paused = above or (paused and view.refault_rate > view.budget / 2)
        for step in decisions.steps:
            assert not paused
            assert step.pages <= pacing.step_most(look.look.vms[0])
            assert look.now - stepped >= pacing.INTERVAL_LEAST
            stepped, steps = look.now, steps + 1
    assert steps > 10


def test_it_is_decided_the_same_again() -> None:
    assert decided(recorded()) == decided(recorded())


@pytest.mark.parametrize("late", [STALE_SECONDS + 0.1, 60.0])
def test_nothing_is_decided_on_looks_that_come_late(late: float) -> None:
    """As many looks, each of them seen too late."""
    for _, decisions in decided([replace(each, now=each.now + late) for each in recorded()]):
        assert not decisions.steps
        assert not decisions.scans
        assert not decisions.balloons
