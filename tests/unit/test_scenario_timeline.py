"""Samples and maps are taken until the VM can not go on; maps stay in order whoever asked for them."""

from __future__ import annotations

import asyncio
from pathlib import Path

from hva_host.agent.model import Sample
from hva_host.agent.ram_frames import RamFrame
from hva_host.scenario.timeline import Timeline
from hvaqemu.errors import PeerLost
from tests.unit.scenario_stand_ins import StandInVm, a_frame


async def test_following_ends_with_the_vm(tmp_path: Path) -> None:
    class Counting(Timeline):
        def add(self, sample: Sample) -> None:
            super().add(sample)
            if len(self.samples) >= 3 and len(self.frames) >= 2:
                enough.set()

    enough = asyncio.Event()
    vm = StandInVm(tmp_path)
    timeline = Counting(interval=0.01, frame_interval=0.01)
    following = asyncio.create_task(timeline.follow(vm))
    await asyncio.wait_for(enough.wait(), 5)
    vm.failure.set_result("QEMU is gone")
    await asyncio.wait_for(following, 5)


async def test_maps_stay_in_order_and_one_that_is_not_to_be_had_is_left_out(tmp_path: Path) -> None:
    class Late(StandInVm):
        """Its first map comes after its second one."""

        async def ram_frame(self) -> RamFrame:
            self.asked += 1
            if self.asked == 1:
                await second.wait()
            return a_frame(self.asked)

        asked = 0

    second = asyncio.Event()
    vm, timeline = Late(tmp_path), Timeline()
    first = asyncio.create_task(timeline.look(vm))
    await asyncio.sleep(0)
    await timeline.look(vm)
    second.set()
    await first
    assert [frame.at_s for frame in timeline.frames] == [2]

    silent = StandInVm(tmp_path)
    silent.errors["frame"] = PeerLost("the pager went")
    await timeline.look(silent)
    assert len(timeline.frames) == 1
