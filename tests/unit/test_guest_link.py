"""GuestLink against the real guest agent in a process of its own, and where there is none.

Between them stands what QEMU would be: a listening unix socket whose one client talks to a serial line.
"""

from __future__ import annotations

import asyncio
import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from hva_host.agent.guest_link import GuestLink
from hva_host.agent.guest_session import LinkState
from hvaqemu import protocol
from hvaqemu.errors import DeadlineExceeded, GuestError, PeerLost, RefusedError
from hvaqemu.framing import encode_frame
from hvaqemu.pages import PageState, Run
from hvaqemu.protocol import encode
from tests.unit.guest_stand_ins import EPOCH, PAGES, Serial


async def test_scans_and_confirms_say_what_the_kernel_says(serial: Serial, link: GuestLink) -> None:
    expected = serial.set_words(random.Random(2))
    await serial.start_agent()
    hello = await link.wait_connected(10)
    assert link.connected and link.hello == hello
    assert hello.ranges == ((0, PAGES),) and hello.page_size == 4096 and not hello.exec_allowed

    report = await link.scan(10)
    assert (report.classes == expected).all() and report.classes.dtype == np.uint8
    assert report.totals == {state: int((expected & 15 == state).sum()) for state in PageState}
    assert 0 < report.memory_free_bytes <= report.memory_total_bytes

    for round in (1, 2):
        expected = serial.set_words(random.Random(round))
        free = await link.confirm(EPOCH, round, Run(0, PAGES), 10)
        assert free.dtype == np.bool_
        assert (free == (expected == PageState.UNUSED)).all(), "each round scans anew"
    for part in (Run(0, 1), Run(30_000, 5_000), Run(PAGES - 3, 3)):
        free = await link.confirm(EPOCH, 1, part, 10)
        assert free.shape == (part.pages,)
        assert (free == (expected == PageState.UNUSED)[part.start : part.stop]).all()

    stats = await link.stats(10)
    assert stats.memory_total_bytes == report.memory_total_bytes and stats.uptime_seconds > 0
    assert await link.ping(10) < 10
    with pytest.raises(RefusedError, match="allow_exec"):
        await link.execute(["true"], 10)


async def test_both_ends_may_come_in_any_order(serial: Serial) -> None:
    await serial.start_agent()
    # It greets nobody meanwhile, which nothing here could tell of.
    await asyncio.sleep(0.5)
    async with GuestLink(serial.socket, pages=PAGES) as link:
        await link.wait_connected(10)
    async with GuestLink(serial.socket, pages=PAGES) as link:
        await link.wait_connected(10)
        await link.scan(10)


async def test_a_killed_agent_fails_requests_and_its_successor_serves(serial: Serial, link: GuestLink) -> None:
    first = await serial.start_agent("--allow-exec")
    before = await link.wait_connected(10)
    call = asyncio.create_task(link.execute(["sleep", "1"], 60))
    await link.ping(10)
    first.kill()
    await first.wait()
    await serial.start_agent("--allow-exec")
    with pytest.raises(PeerLost, match="restarted"):
        await asyncio.wait_for(call, 10)
    after = await link.wait_connected(10)
    assert after.instance != before.instance
    await link.scan(10)


async def test_an_agent_killed_within_a_frame_does_not_swallow_its_successor(serial: Serial, link: GuestLink) -> None:
    await serial.start_agent()
    await link.wait_connected(10)
    serial.inject(encode_frame(0x11, bytes(100_000))[:500])
    with pytest.raises(DeadlineExceeded):
        await link.ping(0.2)
    # The rest of the frame is waited for, a while.
    await asyncio.sleep(1.5)
    assert await link.ping(5) < 5
    assert link.dropped_bytes == 500


async def test_a_silent_agent_costs_a_deadline(serial: Serial, link: GuestLink) -> None:
    agent = await serial.start_agent()
    await link.wait_connected(10)
    agent.send_signal(signal.SIGSTOP)
    begun = time.monotonic()
    with pytest.raises(DeadlineExceeded, match=r"did not answer within 0\.3 s"):
        await link.confirm(EPOCH, 1, Run(0, PAGES), 0.3)
    with pytest.raises(DeadlineExceeded):
        await link.scan(0.2)
    assert time.monotonic() - begun < 3
    agent.send_signal(signal.SIGCONT)
    await link.scan(10)
    assert link.counters.unsolicited >= 2, "late answers count for nothing"


async def test_the_link_comes_back_when_qemu_drops_the_connection(serial: Serial, link: GuestLink) -> None:
    await serial.start_agent("--allow-exec")
    await link.wait_connected(10)
    call = asyncio.create_task(link.execute(["sleep", "60"], 60))
    await link.ping(10)
    serial.hang_up()
    with pytest.raises(PeerLost, match="QEMU closed"):
        await asyncio.wait_for(call, 10)
    await link.wait_connected(10)
    await link.scan(10)


async def test_page_flags_that_cannot_be_read_are_named(serial: Serial, link: GuestLink, tmp_path: Path) -> None:
    (tmp_path / "kpageflags").unlink()
    await serial.start_agent()
    await link.wait_connected(10)
    with pytest.raises(GuestError, match="kpageflags: No such file"):
        await link.scan(10)


async def test_garbage_and_nonsense_do_not_end_the_agent(serial: Serial, link: GuestLink) -> None:
    agent = await serial.start_agent()
    await link.wait_connected(10)
    assert link._channel is not None
    chance = random.Random(3)
    for kind in set(range(256)) - {protocol.MessageType.ATTACH}:
        link._channel.tell(encode_frame(kind, chance.randbytes(chance.randrange(60))) + chance.randbytes(30))
    link._channel.tell(encode(protocol.Ack(0xFFFFFFFF)) + encode(protocol.Exec(5, (), 0, b"")))
    await link.wait_connected(10)
    assert (await link.scan(10)).totals[PageState.UNUSED] > 0
    assert agent.returncode is None


async def test_nobody_there(tmp_path: Path) -> None:
    states: list[LinkState] = []
    async with GuestLink(tmp_path / "none", pages=PAGES, on_change=states.append) as link:
        with pytest.raises(DeadlineExceeded, match="socket could not be reached"):
            await link.wait_connected(0.2)
        with pytest.raises(PeerLost, match="not connected"):
            await link.scan(1)
        waiter = asyncio.create_task(link.wait_connected(30))
        await asyncio.sleep(0.05)
    with pytest.raises(PeerLost, match="closed"):
        await waiter
    assert states == [LinkState.CONNECTING, LinkState.CLOSED]


async def test_a_guest_without_an_agent(serial: Serial, link: GuestLink) -> None:
    with pytest.raises(DeadlineExceeded, match="did not answer"):
        await link.wait_connected(0.5)
