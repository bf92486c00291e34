"""A held guest is stopped without waiting, let go on only by who stopped it, and says what holds it."""

from __future__ import annotations

import asyncio
from typing import cast

import pytest

from hva_host.agent.hold import Hold, describe
from hva_host.agent.model import HeldPages
from hvaqemu.errors import DeadlineExceeded, HostError, PeerLost, RefusedError
from hvaqemu.qemu.qmp import QmpLink, RunStatus

_HELD = HeldPages(layer="/base.raw", pages=[7, 8, 9, 10, 11, 12], reason="block 5 has changed")


class Monitor:
    """QMP, as far as a hold uses it."""

    def __init__(self, *, running: bool = True) -> None:
        self.running = running
        self.said: list[str] = []
        #: Questions that the main loop is too busy to answer.
        self.silent = 0
        #: A vCPU inside a fault keeps ``stop`` from being answered.
        self.stops = asyncio.Event()
        self.stops.set()
        self.connected = True
        self.comes_back = False

    async def wait_connected(self, timeout: float) -> None:
        if not self.connected and not self.comes_back:
            raise DeadlineExceeded("QMP connection")
        self.connected = True

    async def status(self, timeout: float) -> RunStatus:
        await asyncio.sleep(0)
        if not self.connected:
            raise PeerLost("QMP: not connected")
        if self.silent:
            self.silent -= 1
            raise DeadlineExceeded("QMP query-status")
        return RunStatus(running=self.running, status="running" if self.running else "paused")

    async def pause(self, timeout: float) -> None:
        self.said.append("stop")
        await self.stops.wait()
        self.running = False

    async def cont(self, timeout: float) -> None:
        if not self.connected:
            raise PeerLost("QMP: not connected")
        self.said.append("cont")
        await asyncio.sleep(0)
        self.running = True


class Held:
    def __init__(self, monitor: Monitor, *, paused: bool = False) -> None:
        self.monitor = monitor
        self.recorded: list[bool] = []
        self.hold = Hold(paused, self._record)

    def _record(self, ours: bool) -> None:
        self.recorded.append(ours)
        self.monitor.said.append(f"recorded {ours}")

    @property
    def qmp(self) -> QmpLink:
        return cast(QmpLink, self.monitor)

    async def begin(self) -> None:
        self.hold.begin([_HELD], self.qmp)
        await settle()

    async def end(self) -> None:
        self.hold.end()
        assert not self.hold.active
        await self.hold.let_go(self.qmp)


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def test_stopped_and_let_go() -> None:
    held = Held(Monitor())
    await held.begin()
    await held.begin()
    await held.end()
    # Recorded before: a host agent that dies in between leaves no pause that nobody owns.
    assert held.monitor.said == ["recorded True", "stop", "cont", "recorded False"]


async def test_a_pause_of_somebody_elses_stays() -> None:
    held = Held(Monitor(running=False))
    await held.begin()
    await held.end()
    assert held.monitor.said == []


async def test_a_stop_that_is_not_answered_is_not_waited_for() -> None:
    held = Held(Monitor())
    held.monitor.stops.clear()
    async with asyncio.timeout(5):
        await held.begin()
        await held.end()
    assert held.monitor.said == ["recorded True", "stop", "cont", "recorded False"]


async def test_a_main_loop_that_waits_is_asked_until_it_answers() -> None:
    held = Held(Monitor())
    held.monitor.silent = 3
    await held.begin()
    assert held.monitor.said == ["recorded True", "stop"]
    await held.hold.cancel()


async def test_without_qmp_it_is_done_once_there_is() -> None:
    held = Held(Monitor())
    held.monitor.connected = False
    await held.begin()
    assert held.monitor.said == []
    held.monitor.connected = True
    await held.hold.connected(held.qmp)
    await settle()
    assert held.monitor.said == ["recorded True", "stop"]
    held.monitor.connected = False
    await held.end()
    assert held.recorded == [True]
    held.monitor.connected = True
    await held.hold.connected(held.qmp)
    assert held.monitor.said[2:] == ["cont", "recorded False"]


async def test_whoever_wants_to_know_waits_for_the_monitor() -> None:
    held = Held(Monitor())
    await held.begin()
    held.monitor.connected = False
    await held.end()
    with pytest.raises(DeadlineExceeded):
        await held.hold.released(held.qmp)
    assert held.recorded == [True]
    held.monitor.comes_back = True
    await held.hold.released(held.qmp)
    assert held.monitor.said[2:] == ["cont", "recorded False"]
    held.monitor.comes_back = held.monitor.connected = False
    # Nothing to undo, nothing to wait for.
    await held.hold.released(held.qmp)


async def test_a_pause_is_undone_once() -> None:
    held = Held(Monitor(running=False), paused=True)
    async with asyncio.TaskGroup() as both:
        for _ in range(2):
            both.create_task(held.hold.connected(held.qmp))
    assert held.monitor.said == ["cont", "recorded False"]


async def test_the_pause_of_a_host_agent_before_us_is_ours() -> None:
    held = Held(Monitor(running=False), paused=True)
    await held.begin()
    await held.hold.connected(held.qmp)
    await settle()
    assert held.monitor.said == []
    await held.end()
    assert held.monitor.said == ["cont", "recorded False"]


def test_it_says_what_and_what_to_do() -> None:
    hold = Hold(False, lambda _ours: None)
    hold.refuse("one")
    hold.pages = (_HELD, _HELD.model_copy(update={"pages": [3], "reason": "layer /base.raw: ends inside block 9"}))
    with pytest.raises(RefusedError) as refused:
        hold.refuse("one")
    assert str(refused.value) == (
        "VM one is HELD: /base.raw: block 5 has changed (pages 7, 8, 9, 10 and 2 more); "
        "layer /base.raw: ends inside block 9 (page 3) "
        "(put that right, then 'hvaqemu resume one', or end it by 'hvaqemu down one')"
    )
    hold.end()
    hold.without_pager("no memory")
    with pytest.raises(RefusedError, match="VM one is HELD: no pager can be started: no memory"):
        hold.refuse("one")
    hold.without_pager("")
    hold.refuse("one")
    assert describe(_HELD.model_copy(update={"pages": [1, 2]})).endswith("(pages 1, 2)")


async def test_drained_by_a_pause_of_ours_recorded_before_it_is_sent() -> None:
    held = Held(Monitor())
    await held.hold.drain(held.qmp)
    assert held.monitor.said == ["recorded True", "stop", "cont", "recorded False"]
    assert not held.hold.draining


async def test_a_guest_that_somebody_paused_has_no_io_and_stays_paused() -> None:
    held = Held(Monitor(running=False))
    assert await held.hold.drain(held.qmp) == 0.0
    assert held.monitor.said == []
    assert not held.monitor.running


async def test_nobody_elses_stop_comes_between_our_two() -> None:
    """An operator's goes through the same lock; ours would undo it."""
    held = Held(Monitor())
    held.monitor.stops.clear()
    draining = asyncio.create_task(held.hold.drain(held.qmp))
    await settle()
    assert held.monitor.said == ["recorded True", "stop"]
    assert held.hold.draining

    async def operator() -> None:
        async with held.hold.by_operator(held.qmp):
            await held.monitor.pause(1.0)

    stopping = asyncio.create_task(operator())
    await settle()
    held.monitor.stops.set()
    await draining
    await stopping
    assert held.monitor.said == ["recorded True", "stop", "cont", "recorded False", "stop"]
    assert not held.monitor.running


async def test_cancelled_the_guest_goes_on_all_the_same() -> None:
    held = Held(Monitor())
    held.monitor.stops.clear()
    draining = asyncio.create_task(held.hold.drain(held.qmp))
    await settle()
    draining.cancel()
    await settle()
    assert not draining.done(), "it must not leave a guest paused"
    held.monitor.stops.set()
    with pytest.raises(asyncio.CancelledError):
        await draining
    assert held.recorded == [True, False]
    assert held.monitor.running


async def test_what_can_not_be_recorded_is_not_paused() -> None:
    monitor = Monitor()

    def no_room(_ours: bool) -> None:
        raise HostError("vm.json: No space left on device")

    hold = Hold(False, no_room)
    qmp = cast(QmpLink, monitor)
    with pytest.raises(HostError, match="No space left"):
        await hold.drain(qmp)
    hold.begin([_HELD], qmp)
    await settle()
    hold.end()
    await hold.let_go(qmp)
    assert monitor.said == []
    assert monitor.running


async def test_pages_held_while_it_is_drained_keep_the_pause() -> None:
    held = Held(Monitor())
    held.monitor.stops.clear()
    draining = asyncio.create_task(held.hold.drain(held.qmp))
    await settle()
    held.hold.begin([_HELD], held.qmp)
    held.monitor.stops.set()
    await draining
    await settle()
    assert not held.monitor.running
    assert held.recorded == [True], "it is still a pause of ours"
    await held.end()
    await settle()
    assert held.monitor.running
    assert held.recorded[-1] is False


async def test_a_guest_whose_io_does_not_end_is_let_go_on() -> None:
    held = Held(Monitor())

    async def never(timeout: float) -> None:
        held.monitor.said.append("stop")
        raise DeadlineExceeded("QMP stop")

    held.monitor.pause = never  # type: ignore[method-assign]
    with pytest.raises(DeadlineExceeded):
        await held.hold.drain(held.qmp)
    # QEMU takes them in order: whenever it comes to the first, the second follows.
    assert held.monitor.said == ["recorded True", "stop", "cont", "recorded False"]


async def test_what_a_dead_host_agent_began_to_drain_goes_on() -> None:
    held = Held(Monitor(running=False), paused=True)
    await held.hold.connected(held.qmp)
    assert held.monitor.running
    assert held.recorded == [False]


async def test_a_pause_of_ours_that_could_not_be_undone_does_not_undo_an_operators() -> None:
    held = Held(Monitor())
    cont = held.monitor.cont

    async def silent(timeout: float) -> None:
        raise DeadlineExceeded("QMP cont")

    held.monitor.cont = silent  # type: ignore[method-assign]
    with pytest.raises(DeadlineExceeded):
        await held.hold.drain(held.qmp)
    held.monitor.cont = cont  # type: ignore[method-assign]
    async with held.hold.by_operator(held.qmp):
        await held.monitor.pause(1.0)
    await held.hold.connected(held.qmp)
    assert await held.hold.drain(held.qmp) == 0.0
    assert not held.monitor.running
    assert held.recorded == [True, False]
