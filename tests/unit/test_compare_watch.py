"""What a guest says is followed through whatever happens to the monitor, and its worst moment is kept."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import pytest

from hva_host.compare import watch
from hva_host.compare.watch import GuestWatch
from hvaqemu.errors import DeadlineExceeded, PeerLost
from hvaqemu.qemu.guest_stats import GuestStats
from hvaqemu.units import MiB
from tests.unit.compare_stand_ins import StandInMonitor


@pytest.fixture(autouse=True)
def _no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "_LOOK_SECONDS", 0.001)
    monkeypatch.setattr(watch, "ASK_SECONDS", 0)


class Unsteady(StandInMonitor):
    """Does not answer every command the first time."""

    def __init__(self) -> None:
        super().__init__()
        self.refused: list[str] = []

    async def execute(
        self, command: str, arguments: Mapping[str, object] | None = None, *, timeout: float = 10.0
    ) -> object:
        if self.refused.count(command) < 2:
            self.refused.append(command)
            raise PeerLost("QMP: QEMU hung up")
        return await super().execute(command, arguments, timeout=timeout)


async def followed(watch: GuestWatch, enough: asyncio.Event) -> None:
    following = asyncio.create_task(watch.follow())
    async with asyncio.timeout(10):
        await enough.wait()
    assert not following.done()
    following.cancel()
    await asyncio.wait({following})


async def test_a_monitor_that_is_gone_for_a_while_is_asked_again() -> None:
    monitor, heard, enough = Unsteady(), list[GuestStats](), asyncio.Event()

    async def hear(stats: GuestStats) -> None:
        heard.append(stats)
        if len(heard) >= 5:
            enough.set()
        # Whoever listens may meet with the same.
        raise DeadlineExceeded("QMP balloon: no answer")

    watch = GuestWatch(monitor, 100.0, hear)
    await followed(watch, enough)
    assert monitor.refused == ["qom-set"] * 2 + ["qom-get"] * 2
    # QEMU asks the guest on its own from then on.
    assert [command for command, _ in monitor.asked].count("qom-set") == 1
    assert [each.updated for each in heard] == sorted({each.updated for each in heard})
    assert len(watch.points) >= 5
    assert 100.0 <= watch.points[0].at_s <= watch.points[-1].at_s < 110.0


class Silent(StandInMonitor):
    """Its guest never says anything."""

    def __init__(self, enough: asyncio.Event) -> None:
        super().__init__()
        self.silent = True
        self._enough = enough

    async def execute(
        self, command: str, arguments: Mapping[str, object] | None = None, *, timeout: float = 10.0
    ) -> object:
        if len(self.asked) > 10:
            self._enough.set()
        return await super().execute(command, arguments, timeout=timeout)


async def test_a_word_is_heard_once() -> None:
    heard, enough = list[int](), asyncio.Event()
    monitor = Silent(enough)

    async def hear(stats: GuestStats) -> None:
        heard.append(stats.updated)

    watch = GuestWatch(monitor, 0.0, hear)
    await followed(watch, enough)
    # What is there is of nobody.
    assert heard == []
    assert watch.points == []


# Points that are left out because there are too many, and those that come too soon.
@pytest.mark.parametrize("interval", [0, 1])
async def test_the_least_outlives_the_points_that_are_left_out(monkeypatch: pytest.MonkeyPatch, interval: int) -> None:
    monkeypatch.setattr(watch, "_MOST", 4)
    monkeypatch.setattr(watch, "ASK_SECONDS", interval)
    monitor, enough, words = StandInMonitor(used=100 * MiB), asyncio.Event(), 0

    async def hear(_stats: GuestStats) -> None:
        nonlocal words
        words += 1
        # The third word alone is of a guest that is short.
        monitor.used = 500 * MiB if words == 2 else 100 * MiB
        if words >= 40:
            enough.set()

    followed_by = GuestWatch(monitor, 0.0, hear)
    await followed(followed_by, enough)
    assert len(followed_by.points) <= 4
    assert min(point.least_available_bytes or 0 for point in followed_by.points) == 12 * MiB
    assert min(point.available_bytes or 0 for point in followed_by.points) > 12 * MiB
