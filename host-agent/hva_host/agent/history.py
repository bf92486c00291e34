"""What a VM's memory was like since this host agent has it: bounded, and next to free while nothing happens.

A guest that is left alone costs a question to its pager every :data:`IDLE_SECONDS`, and no memory: points that tell
nothing new are not kept. While much moves, points come more often, and maps of guest RAM with them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

from hva_host.agent.model import Record, Sample, VmStatus
from hva_host.agent.ram_frames import RamFrame
from hva_host.agent.thinning import Thinned
from hvaqemu.errors import HvaError
from hvaqemu.pages import PAGE_SHIFT

#: Seconds between points: while much moves, and while little does.
BUSY_SECONDS = 2.0
IDLE_SECONDS = 10.0
#: Points and maps held: some 300 KiB a VM.
MOST = 512
FRAMES_MOST = 64
#: Fewer pages than this are no movement: a guest that is left alone touches some all the time.
_PAGES = 256


class VmReport(Record):
    """All that is known of a VM that is up."""

    status: VmStatus
    timeline: list[Sample]
    ram: list[RamFrame]
    #: Its VM file, as it was understood.
    configuration: dict[str, Any]
    versions: dict[str, str]


class History:
    """The points and maps of one VM.

    :param sample: makes a point; :param frame: makes a map. Both raise an HvaError where a peer does not answer.
    :param frame_seconds: at least between two maps.
    """

    def __init__(
        self,
        sample: Callable[[], Awaitable[Sample]],
        frame: Callable[[], Awaitable[RamFrame]],
        frame_seconds: float,
    ) -> None:
        self._sample = sample
        self._frame = frame
        self._samples: Thinned[Sample] = Thinned(MOST, BUSY_SECONDS)
        self._frames: Thinned[RamFrame] = Thinned(FRAMES_MOST, max(BUSY_SECONDS, frame_seconds))
        #: The point from which on nothing has moved, and the point that the last map was made beside.
        self._still: Sample | None = None
        self._mapped: Sample | None = None
        self._due = asyncio.Event()

    @property
    def samples(self) -> list[Sample]:
        return self._samples.points

    @property
    def frames(self) -> list[RamFrame]:
        return self._frames.points

    def epoch_ended(self) -> None:
        """Something has moved."""
        self._due.set()

    async def run(self) -> None:
        """Look for ever."""
        while True:
            self._due.clear()
            busy = await self.look()
            begin = time.monotonic()
            if not busy:
                with suppress(TimeoutError):
                    async with asyncio.timeout(max(IDLE_SECONDS, self._samples.interval)):
                        await self._due.wait()
            # However often epochs end.
            await asyncio.sleep(max(0.0, self._samples.interval - (time.monotonic() - begin)))

    async def look(self) -> bool:
        """Take a point in, and a map where one is due; whether much has moved. A peer that is silent leaves a gap."""
        with suppress(HvaError):
            sample = await self._sample()
            busy = self._take(sample)
            if self._map_due(sample):
                self._frames.add(await self._frame())
                self._mapped = sample
            return busy
        return False

    def _take(self, sample: Sample) -> bool:
        moved = self._still is None or _moved(self._still, sample)
        if moved or self.samples[-1] is self._still:
            self._samples.add(sample)
        else:
            # As long as nothing moves, the first and the last point say all.
            self._samples.points[-1] = sample
        if moved:
            self._still = sample
        return moved

    def _map_due(self, sample: Sample) -> bool:
        if self._mapped is None:
            return True
        return sample.at_s - self._mapped.at_s >= self._frames.interval and _moved(self._mapped, sample)


def _moved(before: Sample, after: Sample) -> bool:
    pages = zip(_pages(before), _pages(after), strict=True)
    return before.states != after.states or any(abs(one - other) >= _PAGES for one, other in pages)


def _pages(sample: Sample) -> tuple[int, ...]:
    return (
        sample.backing_bytes >> PAGE_SHIFT,
        sample.store_bytes >> PAGE_SHIFT,
        sample.zero_pages,
        sample.layer_pages,
        sample.preserved_pages,
        sample.refault_pages,
    )
