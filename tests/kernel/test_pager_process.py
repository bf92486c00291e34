"""The real pager process, driven over its link as the host agent drives it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import zlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hva_host.agent.epochs import EpochDriver
from hva_host.agent.pager_parent import PagerParent
from hva_host.agent.pager_process import PagerHandle, call
from hva_host.memory.index import build_index
from hva_host.pager.epoch import Member
from hva_host.pager.process_files import descriptors
from hvaqemu.errors import HvaError, LaunchError, RefusedError
from tests.kernel.harness import PAGE, block

PAGES = 256


class Vcpu:
    """The child in QEMU's place, and a pager process for it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.child = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("vcpu.py")), str(PAGES)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
        assert self.child.stdout is not None
        self.child.stdout.readline()
        self.driver = EpochDriver(PAGES, 10.0)
        self.held: list[dict[str, Any]] = []
        self.told_of_hold = asyncio.Event()
        self.parent = PagerParent()
        self.pager = PagerHandle(folder, self.parent, self.on_event)
        self.layers = ((folder / "golden.raw", folder / "golden.idx"),)

    def on_event(self, name: str, data: dict[str, Any]) -> None:
        if name == "held":
            self.held = data["held"]
            self.told_of_hold.set()
        self.driver.on_pager_event(name, data)

    async def start(self) -> None:
        """Fill half of RAM with a layer's blocks and attach the pager."""
        golden = self.folder / "golden.raw"
        golden.write_bytes(b"".join(block(i) for i in range(PAGES // 2)))
        build_index(golden, self.folder / "golden.idx")
        links = descriptors(self.child.pid)
        ram = next(fd for fd, link in links.items() if "memory-backend" in link)
        fd = os.open(f"/proc/{self.child.pid}/fd/{ram}", os.O_RDWR)
        os.pwrite(fd, golden.read_bytes(), 0)
        os.close(fd)
        await self.pager.start(self.child.pid, self.layers)

    async def discard(self) -> dict[str, Any]:
        wanted = np.zeros(PAGES, dtype=np.uint8)
        wanted[: PAGES // 2] = Member.COPY
        return await self.driver.transact(self.pager.link, wanted, 10.0)

    async def read(self, pfn: int) -> int:
        """CRC-32 of a page as the vCPU reads it."""
        return await asyncio.wait_for(asyncio.to_thread(self._read, pfn), 20)

    def _read(self, pfn: int) -> int:
        assert self.child.stdin is not None
        assert self.child.stdout is not None
        self.child.stdin.write(f"r {pfn}\n")
        return int(self.child.stdout.readline().split()[1])


@pytest.fixture
async def vcpu(tmp_path: Path) -> AsyncIterator[Vcpu]:
    found = Vcpu(tmp_path)
    try:
        await found.start()
        yield found
    finally:
        found.child.kill()
        found.child.wait()
        await found.pager.wait_ended(10)
        await found.pager.close()
        found.parent.close()
        with contextlib.suppress(ProcessLookupError):
            os.kill(found.pager.pid, signal.SIGKILL)


async def test_epoch_refault_restore(vcpu: Vcpu) -> None:
    done = await vcpu.discard()
    assert done["discarded_layer"] == PAGES // 2
    assert (await call(vcpu.pager, "status"))["backing_bytes"] == 0
    assert await vcpu.read(5) == zlib.crc32(block(5))
    assert (await vcpu.pager.link.call("restore"))["pages"] == PAGES // 2 - 1
    status = await call(vcpu.pager, "status")
    assert (status["layer_pages"], status["backing_bytes"]) == (0, PAGES // 2 * PAGE)
    assert [await vcpu.read(pfn) for pfn in (0, 77)] == [zlib.crc32(block(0)), zlib.crc32(block(77))]


async def test_a_killed_pager_is_replaced_and_nothing_is_lost(vcpu: Vcpu) -> None:
    await vcpu.discard()
    before = await call(vcpu.pager, "status")
    os.kill(vcpu.pager.pid, signal.SIGKILL)
    await asyncio.wait_for(asyncio.shield(vcpu.pager.link.lost), 5)
    reading = asyncio.create_task(vcpu.read(9))
    await asyncio.sleep(0.1)
    assert not reading.done(), "nobody serves, so the vCPU waits; it must not see zeros"
    await vcpu.pager.start(vcpu.child.pid, vcpu.layers, anew=True)
    assert await reading == zlib.crc32(block(9))
    after = await call(vcpu.pager, "status")
    assert after["epochs"] == before["epochs"]
    assert after["layer_pages"] == before["layer_pages"] - 1


async def test_a_second_pager_is_refused_and_the_first_goes_on(vcpu: Vcpu, tmp_path: Path) -> None:
    await vcpu.discard()
    elsewhere = tmp_path / "second"
    elsewhere.mkdir()
    second = PagerHandle(elsewhere, vcpu.parent, lambda _name, _data: None)
    with pytest.raises(LaunchError, match="another pager serves this VM"):
        await second.start(vcpu.child.pid, ())
    assert second.link.lost.done(), "who watches a pager that never was must not wait for ever"
    assert await vcpu.read(3) == zlib.crc32(block(3))


async def test_a_pager_that_can_not_be_started_says_so_at_once(vcpu: Vcpu, tmp_path: Path) -> None:
    handle = PagerHandle(tmp_path / "missing", vcpu.parent, lambda _name, _data: None)
    with pytest.raises(HvaError):
        await asyncio.wait_for(handle.start(vcpu.child.pid, ()), 5)
    assert handle.link.lost.done()


async def test_a_changed_layer_is_told_and_resumed_after_repair(vcpu: Vcpu) -> None:
    await vcpu.discard()
    golden = vcpu.folder / "golden.raw"
    right = golden.read_bytes()
    golden.write_bytes(bytes(len(right)))
    reading = asyncio.create_task(vcpu.read(11))
    async with asyncio.timeout(10):
        await vcpu.told_of_hold.wait()
    assert vcpu.held[0]["pages"] == [11]
    assert not reading.done()
    assert (await call(vcpu.pager, "resume"))["held"] == 1
    golden.write_bytes(right)
    assert (await call(vcpu.pager, "resume"))["held"] == 0
    assert await reading == zlib.crc32(block(11))


async def test_two_epochs_at_once_are_refused_and_an_abandoned_one_ends(vcpu: Vcpu) -> None:
    wanted = np.full(PAGES, Member.UNUSED, dtype=np.uint8)
    first = asyncio.create_task(vcpu.driver.transact(vcpu.pager.link, wanted, 30.0))
    await asyncio.sleep(0.2)
    with pytest.raises(RefusedError, match="still at an epoch"):
        await vcpu.pager.link.call("begin-epoch", {"seconds": 1, "first": 0}, wanted.tobytes())
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    async with asyncio.timeout(5):
        done = await vcpu.discard()
    assert done["discarded_layer"] == PAGES // 2


async def test_an_epoch_whose_host_agent_is_gone_ends(vcpu: Vcpu) -> None:
    """Nobody confirms it any more: the next host agent needs not wait for its deadline, nor a guest that writes."""
    wanted = np.full(PAGES, Member.UNUSED, dtype=np.uint8)
    await vcpu.pager.link.call("begin-epoch", {"seconds": 300, "first": 0}, wanted.tobytes())
    await vcpu.pager.link.close()
    await vcpu.pager.adopt()
    for _ in range(500):
        if (await call(vcpu.pager, "status"))["phase"] == "done":
            break
        await asyncio.sleep(0.01)
    assert (await vcpu.discard())["discarded_layer"] == PAGES // 2


async def test_nonsense_from_the_other_end_changes_nothing(vcpu: Vcpu) -> None:
    with pytest.raises(RefusedError, match="knows no command"):
        await vcpu.pager.link.call("format-disk")
    with pytest.raises(RefusedError):
        await vcpu.pager.link.call("begin-epoch", {"seconds": 1, "first": 0}, bytes(PAGES + 1))
    with pytest.raises(RefusedError):
        await vcpu.pager.link.call("begin-epoch", {"seconds": 1, "first": PAGES - 1}, bytes(2))
    with pytest.raises(RefusedError):
        await vcpu.pager.link.call("begin-epoch", {"seconds": 1, "first": -1}, bytes(2))
    answer = await vcpu.pager.link.call("confirm", {"epoch": "00" * 16, "round": 1}, bytes(PAGES // 8))
    assert answer == {"accepted": False}
    reader, writer = await asyncio.open_unix_connection(str(vcpu.folder / "pager.sock"))
    writer.write(b"not json\n")
    assert await asyncio.wait_for(reader.read(), 5) == b""
    writer.close()
    assert (await call(vcpu.pager, "hello"))["pages"] == PAGES
