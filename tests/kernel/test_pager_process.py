"""The real pager process, driven over its link as the host agent drives it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hva_host.agent.epochs import EpochDriver
from hva_host.agent.pager_parent import PagerParent
from hva_host.agent.pager_process import PagerHandle, call
from hva_host.pager.membership import Member
from hvaqemu.errors import HvaError, LaunchError, RefusedError
from tests.kernel.harness import PAGE, Vcpu, block, crc, write_layer

PAGES = 256
#: Bounds what only a failure makes long.
_SECONDS = 60.0


class Machine:
    """A child in QEMU's place, and a pager process for it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.child = Vcpu(PAGES)
        self.driver = EpochDriver(PAGES, 10.0)
        self.held: list[dict[str, Any]] = []
        self.told_of_hold = asyncio.Event()
        self.parent = PagerParent()
        self.pager = PagerHandle(folder, self.parent, self.on_event)
        self.layers = (write_layer(folder, b"".join(map(block, range(PAGES // 2)))),)

    def on_event(self, name: str, data: dict[str, Any]) -> None:
        if name == "held":
            self.held = data["held"]
            self.told_of_hold.set()
        self.driver.on_pager_event(name, data)

    async def start(self) -> None:
        """Fill half of RAM with a layer's blocks and attach the pager."""
        self.child.fill(self.layers[0][0].read_bytes())
        await self.pager.start(self.child.pid, self.layers)

    async def discard(self) -> dict[str, Any]:
        wanted = np.zeros(PAGES, dtype=np.uint8)
        wanted[: PAGES // 2] = Member.COPY
        return await self.driver.transact(self.pager.link, wanted, 10.0)

    async def read(self, pfn: int) -> int:
        """CRC-32 of a page as the vCPU reads it."""
        said = await asyncio.wait_for(asyncio.to_thread(self.child.say, f"r {pfn}"), _SECONDS)
        return int(said.split()[1])


@pytest.fixture
async def machine(tmp_path: Path) -> AsyncIterator[Machine]:
    found = Machine(tmp_path)
    try:
        await found.start()
        yield found
    finally:
        found.child.close()
        await found.pager.wait_ended(10)
        await found.pager.close()
        found.parent.close()
        with contextlib.suppress(ProcessLookupError):
            os.kill(found.pager.pid, signal.SIGKILL)


async def test_epoch_refault_restore(machine: Machine) -> None:
    done = await machine.discard()
    assert done["discarded_layer"] == PAGES // 2
    assert (await call(machine.pager, "status"))["backing_bytes"] == 0
    assert await machine.read(5) == crc(block(5))
    assert (await machine.pager.link.call("restore"))["pages"] == PAGES // 2 - 1
    status = await call(machine.pager, "status")
    assert (status["layer_pages"], status["backing_bytes"]) == (0, PAGES // 2 * PAGE)
    assert [await machine.read(pfn) for pfn in (0, 77)] == [crc(block(0)), crc(block(77))]


async def test_a_killed_pager_is_replaced_and_nothing_is_lost(machine: Machine) -> None:
    await machine.discard()
    before = await call(machine.pager, "status")
    os.kill(machine.pager.pid, signal.SIGKILL)
    await asyncio.wait_for(asyncio.shield(machine.pager.link.lost), _SECONDS)
    reading = asyncio.create_task(machine.read(9))
    await asyncio.sleep(0.1)
    assert not reading.done(), "nobody serves, so the vCPU waits; it must not see zeros"
    await machine.pager.start(machine.child.pid, machine.layers, anew=True)
    assert await reading == crc(block(9))
    after = await call(machine.pager, "status")
    assert after["epochs"] == before["epochs"]
    assert after["layer_pages"] == before["layer_pages"] - 1


async def test_a_second_pager_is_refused_and_the_first_goes_on(machine: Machine, tmp_path: Path) -> None:
    await machine.discard()
    elsewhere = tmp_path / "second"
    elsewhere.mkdir()
    second = PagerHandle(elsewhere, machine.parent, lambda _name, _data: None)
    with pytest.raises(LaunchError, match="another pager serves this VM"):
        await second.start(machine.child.pid, ())
    assert second.link.lost.done(), "who watches a pager that never was must not wait for ever"
    assert await machine.read(3) == crc(block(3))


async def test_a_pager_that_can_not_be_started_says_so_at_once(machine: Machine, tmp_path: Path) -> None:
    handle = PagerHandle(tmp_path / "missing", machine.parent, lambda _name, _data: None)
    with pytest.raises(HvaError):
        await asyncio.wait_for(handle.start(machine.child.pid, ()), 5)
    assert handle.link.lost.done()


async def test_a_changed_layer_is_told_and_resumed_after_repair(machine: Machine) -> None:
    await machine.discard()
    golden = machine.folder / "golden.raw"
    right = golden.read_bytes()
    golden.write_bytes(bytes(len(right)))
    reading = asyncio.create_task(machine.read(11))
    async with asyncio.timeout(_SECONDS):
        await machine.told_of_hold.wait()
    assert machine.held[0]["pages"] == [11]
    assert not reading.done()
    assert (await call(machine.pager, "resume"))["held"] == 1
    golden.write_bytes(right)
    assert (await call(machine.pager, "resume"))["held"] == 0
    assert await reading == crc(block(11))


async def test_two_epochs_at_once_are_refused_and_an_abandoned_one_ends(machine: Machine) -> None:
    wanted = np.full(PAGES, Member.UNUSED, dtype=np.uint8)
    first = asyncio.create_task(machine.driver.transact(machine.pager.link, wanted, 30.0))
    await asyncio.sleep(0.2)
    with pytest.raises(RefusedError, match="still at an epoch"):
        await machine.pager.link.call("begin-epoch", {"seconds": 1, "first": 0}, wanted.tobytes())
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    async with asyncio.timeout(5):
        done = await machine.discard()
    assert done["discarded_layer"] == PAGES // 2


async def test_an_epoch_whose_host_agent_is_gone_ends(machine: Machine) -> None:
    """Nobody confirms it any more: the next host agent needs not wait for its deadline, nor a guest that writes."""
    wanted = np.full(PAGES, Member.UNUSED, dtype=np.uint8)
    await machine.pager.link.call("begin-epoch", {"seconds": 300, "first": 0}, wanted.tobytes())
    await machine.pager.link.close()
    await machine.pager.adopt()
    for _ in range(500):
        if (await call(machine.pager, "status"))["phase"] == "done":
            break
        await asyncio.sleep(0.01)
    assert (await machine.discard())["discarded_layer"] == PAGES // 2


async def test_nonsense_from_the_other_end_changes_nothing(machine: Machine) -> None:
    with pytest.raises(RefusedError, match="knows no command"):
        await machine.pager.link.call("format-disk")
    with pytest.raises(RefusedError):
        await machine.pager.link.call("begin-epoch", {"seconds": 1, "first": 0}, bytes(PAGES + 1))
    with pytest.raises(RefusedError):
        await machine.pager.link.call("begin-epoch", {"seconds": 1, "first": PAGES - 1}, bytes(2))
    with pytest.raises(RefusedError):
        await machine.pager.link.call("begin-epoch", {"seconds": 1, "first": -1}, bytes(2))
    answer = await machine.pager.link.call("confirm", {"epoch": "00" * 16, "round": 1}, bytes(PAGES // 8))
    assert answer == {"accepted": False}
    reader, writer = await asyncio.open_unix_connection(str(machine.folder / "pager.sock"))
    writer.write(b"not json\n")
    assert await asyncio.wait_for(reader.read(), _SECONDS) == b""
    writer.close()
    assert (await call(machine.pager, "hello"))["pages"] == PAGES
