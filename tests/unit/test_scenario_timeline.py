"""The timeline stays bounded, in order, even, and never loses its newest point."""

from __future__ import annotations

import asyncio
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from hva_host.agent.model import Sample
from hva_host.scenario.timeline import Timeline
from tests.unit.scenario_stand_ins import StandInVm, a_sample


@given(st.integers(1, 40).map(lambda half: 2 * half), st.integers(0, 500))
def test_bounded_and_in_order(most: int, count: int) -> None:
    timeline = Timeline(most=most)
    for at in range(count):
        timeline.add(a_sample(at))
    ats = [sample.at_s for sample in timeline.samples]
    assert len(ats) <= most
    assert ats == sorted(set(ats))
    if count:
        assert ats[0] == 0
        assert ats[-1] == count - 1


def test_thinning_slows_down() -> None:
    timeline = Timeline(most=8, interval=1.0)
    for at in range(9):
        timeline.add(a_sample(at))
    assert timeline.interval == 2.0
    assert [sample.at_s for sample in timeline.samples] == [0, 2, 4, 6, 8]


async def test_following_ends_with_the_vm(tmp_path: Path) -> None:
    class Counting(Timeline):
        def add(self, sample: Sample) -> None:
            super().add(sample)
            if len(self.samples) == 3:
                enough.set()

    enough = asyncio.Event()
    vm = StandInVm(tmp_path)
    following = asyncio.create_task(Counting(interval=0.01).follow(vm))
    await asyncio.wait_for(enough.wait(), 5)
    vm.failure.set_result("QEMU is gone")
    await asyncio.wait_for(following, 5)
