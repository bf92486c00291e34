"""``kill -9`` of the pager between each two of its steps: the guest reads the right bytes, and the next epoch works."""

from __future__ import annotations

import asyncio
import os
import signal
import zlib
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest

from hva_host.agent import pager_keeper, pager_process
from hva_host.agent.pager_process import PagerHandle, call
from hva_host.memory.ledger import LEDGER_NAME
from hva_host.pager.process_files import descriptors
from hvaqemu.errors import RefusedError
from tests.kernel.faults import COPIES, FREE, FREED, PAGES, Machine
from tests.kernel.harness import PAGE

EPOCH = [
    "pager.epoch.sifted",
    "uffd.protect",
    "pager.epoch.protecting",
    "pager.epoch.protected",
    "pager.epoch.compared",
    "pager.discard.stored",
    "pager.discard.punch",
    "pager.discard.punched",
    "pager.epoch.proven",
    "pager.write.left",
    "pager.epoch.confirmed",
    "pager.epoch.discarded",
    "uffd.unprotect",
    "pager.epoch.unprotecting",
]
REFAULT = [
    "pager.refault.read",
    "layer.read",
    "pager.refault.checked",
    "uffd.copy",
    "uffd.zero",
    "pager.refault.filled",
]
TURN = ["pager.epoch.confirmed", "pager.epoch.discarded", "pager.freed.proven", "pager.freed.turned"]
ATTACH = [
    "pager.parent.fork",
    "ledger.allocate",
    "pager.attach.locked",
    "pager.attach.registered",
    "pager.attach.erased",
    "pager.attach.unprotected",
    "pager.attach.woken",
]


@pytest.fixture
async def machine(tmp_path: Path) -> AsyncIterator[Machine]:
    found = Machine(tmp_path, dict.fromkeys([*EPOCH, *REFAULT, *TURN, *ATTACH, "pager.restore.filled"], "kill"))
    try:
        await found.start()
        yield found
    finally:
        await found.close()


async def everything_works(machine: Machine) -> None:
    """What was discarded reads right, and all of it can be discarded and read again."""
    await machine.check()
    restarts = machine.restarts
    done = await machine.epoch()
    assert done is not None
    assert done["discarded_layer"] == len(COPIES)
    # The page that was written while protected has left the epoch.
    assert done["discarded_zero"] == len(FREE) - 1
    await machine.check()
    assert machine.restarts == restarts


@pytest.mark.parametrize("point", EPOCH)
async def test_in_an_epoch(machine: Machine, point: str) -> None:
    machine.arm(point)
    assert await machine.epoch() is None
    assert not machine.armed(point)
    await machine.restarted(1)
    await everything_works(machine)


@pytest.mark.parametrize("point", REFAULT)
async def test_in_a_refault(machine: Machine, point: str) -> None:
    assert (await machine.epoch() or {})["discarded"] == len(COPIES) + len(FREE) - 1
    machine.arm(point)
    await machine.check()
    assert not machine.armed(point)
    await machine.restarted(1)
    await everything_works(machine)


@pytest.mark.parametrize("point", TURN)
async def test_while_freed_pages_become_zero(machine: Machine, point: str) -> None:
    assert await machine.epoch() is not None
    machine.arm(point)
    assert await machine.turn() is None
    assert not machine.armed(point)
    await machine.restarted(1)
    done = await machine.turn()
    assert done is not None
    # Each store is one page's: whoever was turned before the kill is ZERO already.
    turned = len(FREED) if point == "pager.freed.turned" else 0
    assert done["freed"] == len(FREED) - turned
    status = await call(machine.pager, "status")
    assert (status["zero_pages"], status["layer_pages"]) == (len(FREE) - 1 + len(FREED), len(COPIES) - len(FREED))
    zeros = {zlib.crc32(bytes(PAGE))}
    for pfn in FREED:
        machine.expected[pfn] = zeros
    await machine.check()
    await machine.restarted(1)


@pytest.mark.parametrize("point", ATTACH)
async def test_while_it_attaches(machine: Machine, point: str) -> None:
    """Killed, and its successor too."""
    assert await machine.epoch() is not None
    counted = await call(machine.pager, "status")
    machine.arm(point)
    machine.kill_pager()
    # A vCPU waits through both deaths.
    assert await machine.read(COPIES[7]) in machine.expected[COPIES[7]]
    assert not machine.armed(point)
    await machine.restarted(1)
    now = await call(machine.pager, "status")
    assert (now["epochs"], now["discarded_pages"]) == (counted["epochs"], counted["discarded_pages"])
    assert now["stalls"]["count"] >= counted["stalls"]["count"] > 0
    await everything_works(machine)


async def test_in_a_restore(machine: Machine) -> None:
    assert await machine.epoch() is not None
    machine.arm("pager.restore.filled")
    with pytest.raises(Exception, match="pager"):
        await call(machine.pager, "restore")
    await machine.restarted(1)
    assert (await call(machine.pager, "restore"))["left"] == 0
    await everything_works(machine)


async def test_with_memory_plugged_in_since(machine: Machine) -> None:
    """No epoch any more, but what is discarded comes back, from the right memory."""
    assert await machine.epoch() is not None
    await machine.plug(PAGES)
    await machine.replace_pager()
    with pytest.raises(RefusedError, match="several RAM memfds"):
        await machine.driver.transact(machine.pager.link, np.zeros(PAGES, dtype=np.uint8), 1.0)
    await machine.check()


async def test_again_and_again(machine: Machine) -> None:
    """Killed whenever it is back, while the guest reads what was discarded."""
    assert await machine.epoch() is not None
    reading = asyncio.create_task(machine.check())
    for times in range(1, 6):
        machine.kill_pager()
        await machine.restarted(times)
    await reading
    await everything_works(machine)


async def test_stuck(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pager that stands still is as good as dead: it is killed and replaced, and the guest goes on."""
    assert await machine.epoch() is not None
    monkeypatch.setattr(pager_keeper, "_STUCK_SECONDS", 0.5)
    monkeypatch.setattr(pager_keeper, "_ASK_SECONDS", 0.1)
    # Let the keeper come to the new interval.
    await machine.replace_pager()
    os.kill(machine.pager.pid, signal.SIGSTOP)
    assert await machine.read(COPIES[3]) in machine.expected[COPIES[3]]
    await machine.restarted(2)
    # The next one is not stuck where it only has to wait for a processor.
    monkeypatch.undo()
    await everything_works(machine)


async def test_stuck_and_its_host_agent_is_dead(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next host agent knows no number of it: it finds who holds the ledger, and replaces that."""
    assert await machine.epoch() is not None
    # It would see its pager's death, and start another at the same time.
    await machine.keep_no_more()
    stuck = machine.pager.pid
    os.kill(stuck, signal.SIGSTOP)
    monkeypatch.setattr(pager_process, "CALL_SECONDS", 0.5)
    handle = PagerHandle(machine.folder, machine.parent, lambda _name, _data: None)
    assert machine.process is not None
    try:
        assert await pager_keeper.connect_or_start(handle, machine.process, machine.layers)
        assert handle.pid != stuck
        assert await machine.read(COPIES[5]) in machine.expected[COPIES[5]]
        assert (await call(handle, "status"))["layer_pages"] == len(COPIES) - 1
    finally:
        await handle.close()


async def test_counters_at_their_limit_end_nobody(machine: Machine) -> None:
    """What a compromised QEMU could write into its ledger."""
    assert await machine.epoch() is not None
    fd = next(fd for fd, link in descriptors(machine.child.pid).items() if LEDGER_NAME in link)
    ledger = os.open(f"/proc/{machine.child.pid}/fd/{fd}", os.O_RDWR)
    os.pwrite(ledger, b"\xff" * (4096 - 512), 512)
    os.close(ledger)
    await machine.check()
    assert (await call(machine.pager, "status"))["refaults"] < len(COPIES) + len(FREE)
    assert machine.restarts == 0
