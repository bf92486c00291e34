"""kill -9 of QEMU, whatever it and its peers are at: who waits is told why at once, nothing is left behind."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from hva_host.agent.fleet import Fleet
from hva_host.agent.model import VmState
from hvaqemu.config import VmConfig
from hvaqemu.errors import HvaError, PeerLost
from hvaqemu.faultpoints import VARIABLE
from hvaqemu.paths import runtime_dir
from hvaqemu.units import MiB
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

pytestmark = pytest.mark.timeout(600)

_NAME = "killed"
_MEMORY = 192 * MiB
#: Far less than the deadlines of what is interrupted, far more than telling everybody takes.
_SOON = 30.0
#: QEMU's own standard error, where it would say what ails it; and how that is shown.
_LAST_WORDS, _SHOWN = "last \033[31mwords\n", r"last \x1b[31mwords"
_POINT = "pager.restore.filled"


@pytest.fixture(autouse=True)
def point(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Make this file, and the pager stands still in the middle of the next restore."""
    path = tmp_path / "point"
    monkeypatch.setenv(VARIABLE, f"{_POINT}:stop:{path}")
    yield path


def kill(guest: Guest) -> None:
    """Kill QEMU, which has just said something."""
    Path(f"/proc/{guest.qemu_pid}/fd/2").write_text(_LAST_WORDS)
    guest.vm.process.send_signal(signal.SIGKILL)


# Each brings a guest to a state, kills QEMU in it, and returns what waited for an answer; or None.


async def idle(guest: Guest, _point: Path) -> None:
    kill(guest)


async def paused(guest: Guest, _point: Path) -> None:
    await guest.vm.qmp.pause()
    await until(lambda: guest.vm.state is VmState.PAUSED, _SOON, "a pause")
    kill(guest)


async def executing(guest: Guest, _point: Path) -> Awaitable[Any]:
    asked = asyncio.create_task(guest.vm.execute(["sleep", "600"], timeout=600))
    await guest.run("until pidof sleep; do usleep 20000; done")
    kill(guest)
    return asked


async def scanning(guest: Guest, _point: Path) -> Awaitable[Any]:
    """The guest is at a scan: it was asked and has not answered."""
    return await _asked(guest, "scan")


async def confirming(guest: Guest, _point: Path) -> Awaitable[Any]:
    """Pages are protected, and the guest is asked whether they are free."""
    await guest.run("dd if=/dev/zero of=/dev/shm/used bs=1M count=32 2>/dev/null; rm /dev/shm/used")
    return await _asked(guest, "confirm")


async def _asked(guest: Guest, question: str) -> Awaitable[Any]:
    ask, came = getattr(guest.vm.guest, question), asyncio.Event()

    async def asked(*arguments: Any) -> Any:
        answer = asyncio.create_task(ask(*arguments))
        # Once: the question is written.
        await asyncio.sleep(0)
        assert not answer.done()
        kill(guest)
        came.set()
        return await answer

    setattr(guest.vm.guest, question, asked)
    reclaim = asyncio.create_task(guest.vm.reclaim(BOTH))
    async with asyncio.timeout(STEP_SECONDS):
        await came.wait()
    return reclaim


async def reclaiming(guest: Guest, _point: Path) -> Awaitable[Any]:
    """Epochs follow each other without end."""
    guest.vm.start_reclaiming(BOTH, 0.0)
    await until(lambda: guest.heard("EPOCH") > 1, STEP_SECONDS, "epochs")
    kill(guest)
    return guest.vm.stop_reclaiming()


async def restoring(guest: Guest, point: Path) -> Awaitable[Any]:
    """Some pages are back, and the pager, which stands still, is at the others."""
    await guest.tree_digest()
    assert (await guest.vm.reclaim(BOTH)).discarded > 1000
    pager = guest.vm.pager.pid
    point.touch()
    restore = asyncio.create_task(guest.vm.restore())
    await until(lambda: _stopped(pager), STEP_SECONDS, "a restore")
    assert not restore.done()
    kill(guest)
    os.kill(pager, signal.SIGCONT)
    return restore


async def ballooning(guest: Guest, _point: Path) -> Awaitable[Any]:
    """The balloon has begun to grow."""
    asked = asyncio.create_task(guest.vm.balloon(64 * MiB, 600.0))
    before = guest.presence().sum()
    await guest.run("cat /proc/meminfo >/dev/null")
    await until(lambda: guest.presence().sum() < before or asked.done(), STEP_SECONDS, "a balloon")
    assert not asked.done()
    kill(guest)
    return asked


def _stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


@pytest.mark.parametrize(
    "state",
    [idle, paused, executing, scanning, confirming, reclaiming, restoring, ballooning],
    ids=lambda f: f.__name__,
)
async def test_in_state(state: Callable[[Guest, Path], Awaitable[Awaitable[Any] | None]], point: Path) -> None:
    async with running_guest(_NAME, memory=_MEMORY) as guest:
        vm, pager = guest.vm, guest.vm.pager.pid
        waiting = await state(guest, point)
        async with asyncio.timeout(_SOON):
            reason = await vm.failure
            assert reason == f"QEMU was killed by SIGKILL: {_SHOWN}"
            if waiting is not None:
                with pytest.raises(PeerLost):
                    await waiting
            for ask in (vm.reclaim(BOTH), vm.restore(), vm.execute(["true"], timeout=600), vm.balloon(128 * MiB, 600)):
                with pytest.raises(PeerLost):
                    await ask
            assert await vm.wait_gone() == reason
        await until(lambda: not alive(pager), _SOON, "the pager's own end")
        # Nobody tried to replace a pager that had nothing left to do.
        assert guest.heard("PAGER_STARTED") == 0
        status = await vm.status()
        assert (status.state, status.reason, status.guest_connected) == (VmState.GONE, reason, False)
        assert await guest.fleet.down(_NAME) == "it was gone"
        await nothing_left(_NAME)


@asynccontextmanager
async def _fleet(seen: list[str]) -> AsyncIterator[Fleet]:
    fleet = Fleet(runtime_dir(), embedded=True, on_event=lambda event, _data: seen.append(event))
    try:
        yield fleet
    finally:
        await fleet.close()


@pytest.mark.parametrize("after", ["starting QEMU", "attaching the pager", "booting the guest"])
async def test_before_hello(after: str) -> None:
    """QEMU dies while the VM starts, as soon as there is one: ``up`` says why, and nothing is left to take down."""
    config = VmConfig(name=_NAME, memory=_MEMORY, boot_timeout=BOOT_SECONDS)
    said: list[str] = []
    folder = runtime_dir() / "vms" / _NAME
    async with _fleet([]) as fleet:
        starting = asyncio.create_task(fleet.up(config, said.append))
        async with asyncio.timeout(_SOON + STEP_SECONDS):
            while after not in said or (qemu := _qemu(folder)) is None:
                assert not starting.done(), starting.exception()
                await asyncio.sleep(0.005)
            os.kill(qemu, signal.SIGKILL)
            with pytest.raises(HvaError) as raised:
                await starting
        assert "killed by SIGKILL" in str(raised.value), raised.value
        assert "\n" not in str(raised.value)
        assert fleet.vms() == []
        await nothing_left(_NAME)
        # The name is free again.
        with pytest.raises(HvaError, match="no such VM"):
            fleet.get(_NAME)


def _qemu(folder: Path) -> int | None:
    """The process that runs the VM of a folder, if it has come to be QEMU."""
    mark = os.fsencode(folder)
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with suppress(OSError):
                words = (entry / "cmdline").read_bytes()
                if words.startswith(b"qemu-system") and mark in words:
                    return int(entry.name)
    return None
