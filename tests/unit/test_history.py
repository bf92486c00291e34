"""A VM's history: bounded, without points that tell nothing, and with a gap where a peer is silent."""

from __future__ import annotations

import asyncio
from itertools import pairwise

import pytest

from hva_host.agent import history
from hva_host.agent.history import FRAMES_MOST, MOST, History
from hva_host.agent.model import Sample
from hva_host.agent.ram_frames import RamFrame
from hvaqemu.errors import PeerLost
from hvaqemu.units import MiB
from tests.unit.scenario_stand_ins import a_frame, a_sample


class Guest:
    """A guest whose time and backing are what a test says."""

    def __init__(self) -> None:
        self.at = 0.0
        self.backing = 100 * MiB
        self.silent = False
        self.maps = 0
        #: Holds something for each time it was looked at.
        self.looks: asyncio.Queue[float] = asyncio.Queue()
        self.history = History(self.sample, self.frame, 5.0)

    async def sample(self) -> Sample:
        self.looks.put_nowait(self.at)
        if self.silent:
            raise PeerLost("the pager went")
        return a_sample().model_copy(update={"at_s": self.at, "backing_bytes": self.backing})

    async def frame(self) -> RamFrame:
        self.maps += 1
        return a_frame(self.at)

    async def look(self, at: float, backing: int | None = None) -> bool:
        self.at = at
        self.backing = self.backing if backing is None else backing
        return await self.history.look()

    @property
    def points(self) -> list[float]:
        return [sample.at_s for sample in self.history.samples]


async def test_a_guest_that_is_left_alone_takes_two_points_and_one_map() -> None:
    guest = Guest()
    assert await guest.look(0)
    for at in range(10, 5000, 10):
        # A few pages more or less are not worth a word, and do not add up unseen.
        assert not await guest.look(at, 100 * MiB + at % 20 * 4096)
    assert guest.points == [0, 4990]
    assert guest.maps == 1
    assert await guest.look(5000, 60 * MiB)
    assert not await guest.look(5010)
    assert not await guest.look(5020)
    assert guest.points == [0, 4990, 5000, 5020]
    assert guest.maps == 2


async def test_what_moves_slowly_is_seen() -> None:
    guest = Guest()
    await guest.look(0)
    for step in range(1, 81):
        await guest.look(step * 10, 100 * MiB - step * MiB // 4)
    backing = [sample.backing_bytes for sample in guest.history.samples]
    assert len(backing) < 50
    assert max(abs(one - other) for one, other in pairwise(backing)) <= MiB


async def test_maps_keep_their_distance_and_everything_is_bounded() -> None:
    guest = Guest()
    for second in range(0, 8000, 2):
        await guest.look(second, (50 + second % 200) * MiB)
    assert len(guest.points) <= MOST
    assert len(guest.history.frames) <= FRAMES_MOST
    assert guest.points[-1] == 7998
    ats = [frame.at_s for frame in guest.history.frames]
    assert all(later - earlier >= 5 for earlier, later in pairwise(ats))
    assert ats[-1] > 7000


async def test_a_silent_peer_leaves_a_gap() -> None:
    guest = Guest()
    await guest.look(0)
    guest.silent = True
    assert not await guest.look(10, 60 * MiB)
    guest.silent = False
    assert await guest.look(20)
    assert guest.points == [0, 20]


async def test_it_looks_seldom_unless_an_epoch_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "BUSY_SECONDS", 0.01)
    guest = Guest()
    looking = asyncio.create_task(guest.history.run())
    try:
        async with asyncio.timeout(5):
            for _ in range(2):
                await guest.looks.get()
        # Idle now, for ten seconds.
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(guest.looks.get(), 0.1)
        guest.history.epoch_ended()
        await asyncio.wait_for(guest.looks.get(), 5)
    finally:
        looking.cancel()
