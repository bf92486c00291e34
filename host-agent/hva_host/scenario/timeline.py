"""Follows a VM while a scenario plays; holds a bounded number of points and maps however long that takes."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress

from hva_host.agent.model import Sample
from hva_host.agent.ram_frames import RamFrame
from hva_host.agent.thinning import Thinned
from hva_host.scenario.seam import PlayedVm
from hvaqemu.errors import HvaError
from hvaqemu.qemu.race import race

#: Seconds between samples, and between maps of guest RAM, at first.
INTERVAL = 0.15
FRAME_INTERVAL = 1.0
#: Samples and maps held.
MOST = 2048
FRAMES_MOST = 128
#: Seconds a sample or map may take; a VM that answers slower leaves a gap.
DEADLINE = 5.0


class Timeline:
    """The samples and maps, at about even distances."""

    def __init__(self, interval: float = INTERVAL, frame_interval: float = FRAME_INTERVAL) -> None:
        self._samples: Thinned[Sample] = Thinned(MOST, interval)
        self._frames: Thinned[RamFrame] = Thinned(FRAMES_MOST, frame_interval)

    @property
    def samples(self) -> list[Sample]:
        return self._samples.points

    @property
    def frames(self) -> list[RamFrame]:
        return self._frames.points

    def add(self, sample: Sample) -> None:
        """Take a point in."""
        self._samples.add(sample)

    async def look(self, vm: PlayedVm) -> None:
        """Take a map in, whenever the last one was. One that is not to be had is left out."""
        with suppress(HvaError):
            frame = await race(vm.ram_frame(), DEADLINE, "mapping guest RAM", vm.failure)
            # Two of them may have been under way at once.
            if not self.frames or frame.at_s > self.frames[-1].at_s:
                self._frames.add(frame)

    async def follow(self, vm: PlayedVm) -> None:
        """Sample until cancelled, or until the VM can not go on."""
        mapping = asyncio.create_task(self._map(vm))
        try:
            while not vm.failure.done():
                begin = time.monotonic()
                # A gap in a picture is no reason to end a run.
                with suppress(HvaError):
                    self.add(await race(vm.sample(), DEADLINE, "sampling", vm.failure))
                await asyncio.sleep(_rest(self._samples.interval, begin))
        finally:
            mapping.cancel()
            await asyncio.wait({mapping})

    async def _map(self, vm: PlayedVm) -> None:
        while not vm.failure.done():
            begin = time.monotonic()
            await self.look(vm)
            await asyncio.sleep(_rest(self._frames.interval, begin))


def _rest(interval: float, begin: float) -> float:
    """Seconds to wait after what began at ``begin``: never nothing, however long that took."""
    return max(interval - (time.monotonic() - begin), interval / 4)
