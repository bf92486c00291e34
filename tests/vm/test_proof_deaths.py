"""Whoever dies or falls silent: clear states, bounded waits, right bytes, nothing left behind."""

from __future__ import annotations

import asyncio
import os
import re
import signal
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from hva_host.agent import epochs, fleet, guest_session
from hva_host.agent.model import VmState
from hvaqemu.errors import ConfigError, DeadlineExceeded, HvaError, PeerLost
from hvaqemu.pages import STATE_MASK, PageState, Run
from hvaqemu.qemu.process import StopTimeouts
from tests.vm.board import SERIAL, Board
from tests.vm.harness import (
    BOOT_SECONDS,
    BOTH,
    STEP_SECONDS,
    Guest,
    alive,
    nothing_left,
    running_guest,
    until,
)

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(900)]

#: Far more than anything here needs; what must be bounded is bounded well below the deadlines of what it interrupts.
_SOON = 30.0


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> Board:
    return Board(tmp_path_factory.mktemp("disk") / "board.raw")


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def guest(board: Board) -> AsyncIterator[Guest]:
    async with running_guest("deaths", extra_disks=[board.disk]) as found:
        yield found


async def reclaim_is_sound(guest: Guest) -> None:
    """Reclaiming works, and what was discarded comes back as it was."""
    tree = await guest.tree_digest()
    result = await guest.vm.reclaim(BOTH)
    assert sum(stats.discarded_layer for stats in result.epochs) > 5_000
    assert sum(stats.discarded_zero for stats in result.epochs) > 0
    before = await guest.vm.measure()
    assert await guest.tree_digest() == tree
    assert (await guest.vm.measure()).refault_pages - before.refault_pages > 5_000
    assert await guest.complaints() == []


async def test_taken_name(guest: Guest) -> None:
    with pytest.raises(ConfigError, match=r"VM deaths: the name is taken"):
        await guest.fleet.up(guest.vm.config, print)
    assert (await guest.vm.status()).state is VmState.RUNNING


async def test_guest_agent_killed(guest: Guest) -> None:
    attached = guest.heard("GUEST_AGENT")
    asked = asyncio.create_task(guest.vm.execute(["sleep", "300"], timeout=300))
    await guest.run("until pidof sleep; do usleep 20000; done")
    with pytest.raises(PeerLost):
        # Its own answer is lost too: it kills who would send it.
        await guest.vm.execute(["sh", "-c", "kill -9 $PPID"], timeout=300)
    with pytest.raises(PeerLost, match="restarted"):
        async with asyncio.timeout(_SOON):
            await asked
    await guest.vm.guest.wait_connected(STEP_SECONDS)
    assert guest.heard("GUEST_AGENT") > attached
    assert (await guest.vm.status()).state is VmState.RUNNING
    await guest.run("pkill -9 sleep; true")
    await reclaim_is_sound(guest)


async def test_guest_agent_silent(guest: Guest, board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    """An agent that is stopped between its scan and the confirmation, and one that answers no scan either."""
    guest.protection(monkeypatch, 4.0)
    # However long all of this takes: that an agent falls silent is another test's subject.
    monkeypatch.setattr(guest_session, "_SILENT_AFTER", 1000.0)
    await guest.program("writer", SERIAL)
    await board.beats()
    # Free pages that the host has, and copies to discard.
    await guest.tree_digest()
    await guest.run("dd if=/dev/zero of=/dev/shm/used bs=1M count=64 2>/dev/null; rm /dev/shm/used")
    confirm = guest.vm.guest.confirm

    async def never(epoch: bytes, number: int, part: Run, timeout: float) -> Any:
        await board.do("signal", signal.SIGSTOP)
        return await confirm(epoch, number, part, timeout)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(guest.vm.guest, "confirm", never)
        before = guest.presence()
        stats = await guest.epoch(*BOTH)
    assert stats.note == "the guest agent did not confirm in time"
    assert stats.unconfirmed > 5_000
    assert stats.discarded_layer > 5_000
    unused = guest.classes() & STATE_MASK == PageState.UNUSED
    assert not (before & unused & ~guest.presence()).any()

    # Nothing stays protected: the guest writes over all of its memory again and again.
    await board.beats(4)
    assert (await guest.vm.status()).state is VmState.RUNNING

    # Now without even a new scan: the old report serves for copies.
    restored = await guest.vm.restore()
    assert restored > 5_000
    monkeypatch.setattr(epochs, "_SCAN_SECONDS", 0.1)
    report = guest.vm.reclaimer.report
    before = guest.presence()
    stats = await guest.epoch(*BOTH)
    assert guest.vm.reclaimer.report is report
    assert stats.note == "the guest agent did not confirm in time"
    assert stats.discarded_layer > 5_000
    assert not (before & unused & ~guest.presence()).any()
    with pytest.raises(DeadlineExceeded):
        await guest.vm.guest.ping(0.2)

    await board.do("signal", signal.SIGCONT)
    await guest.vm.guest.ping(STEP_SECONDS)
    monkeypatch.undo()
    stats = await guest.epoch(*BOTH)
    assert not stats.note
    assert stats.discarded_zero > 5_000
    await board.beats(4)
    await guest.run("pkill -9 -f [e]xtra0")
    await reclaim_is_sound(guest)


async def test_pager_killed(guest: Guest) -> None:
    tree = await guest.tree_digest()
    await guest.vm.reclaim(BOTH)
    first = guest.vm.pager.pid
    restarts = (await guest.vm.status()).pager_restarts
    reading = asyncio.create_task(guest.tree_digest())
    await asyncio.sleep(0.2)
    os.kill(first, signal.SIGKILL)
    assert await reading == tree
    await until(lambda: guest.vm.record.pager_restarts == restarts + 1, STEP_SECONDS, "another pager")
    status = await guest.vm.status()
    assert (status.state, status.pager_restarts) == (VmState.RUNNING, restarts + 1)
    assert status.pager_pid != first
    assert not alive(first)
    assert 0 < status.pager_pause_s < _SOON
    await reclaim_is_sound(guest)


async def test_pager_killed_during_epochs(guest: Guest) -> None:
    restarts = (await guest.vm.status()).pager_restarts
    guest.vm.start_reclaiming(BOTH, 0.0)
    seen = guest.heard("EPOCH")
    await until(lambda: guest.heard("EPOCH") > seen, STEP_SECONDS, "an epoch")
    os.kill(guest.vm.pager.pid, signal.SIGKILL)
    await until(lambda: guest.heard("PAGER_STARTED") > restarts, STEP_SECONDS, "a new pager")
    seen = guest.heard("EPOCH")
    await until(lambda: guest.heard("EPOCH") > seen + 1, STEP_SECONDS, "epochs by the new pager")
    assert (await guest.vm.stop_reclaiming()).discarded > 0
    assert (await guest.vm.status()).pager_restarts == restarts + 1
    await reclaim_is_sound(guest)


@pytest.mark.parametrize("how", ["reboot -f", "system_reset"])
async def test_reboot(guest: Guest, how: str) -> None:
    boot = await guest.boot_id()
    await guest.vm.reclaim(BOTH)
    if how == "system_reset":
        await guest.vm.qmp.execute("system_reset")
    else:
        with pytest.raises(HvaError):
            await guest.vm.execute(["sh", "-c", how], timeout=BOOT_SECONDS)
    resets = [data for name, data in guest.events if name == "VM_RESET"]
    assert resets

    await guest.rebooted(boot)
    status = await guest.vm.status()
    assert (status.state, status.guest_connected) == (VmState.RUNNING, True)
    assert not guest.vm.failure.done()
    await reclaim_is_sound(guest)


async def test_panic(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last one: nothing is left of the guest."""
    # A busy host's QEMU may take longer to quit than it is given.
    monkeypatch.setattr(fleet, "_DOWN", StopTimeouts(quit=60.0))
    asked = asyncio.create_task(guest.vm.execute(["sh", "-c", "echo c >/proc/sysrq-trigger"], timeout=300))
    async with asyncio.timeout(_SOON):
        reason = await guest.vm.failure
    assert reason.isprintable()
    assert re.fullmatch(
        r"the guest's kernel panicked: \[.*\] Kernel panic - not syncing: sysrq triggered crash", reason
    )
    status = await guest.vm.status()
    assert (status.state, status.reason) == (VmState.PANICKED, reason)
    # Nobody answers any more, but who asked can stop waiting.
    asked.cancel()
    await asyncio.wait({asked}, timeout=_SOON)
    assert asked.cancelled()
    assert await guest.fleet.down(guest.vm.name) == "QEMU quit on request"
    await nothing_left(guest.vm.name)
