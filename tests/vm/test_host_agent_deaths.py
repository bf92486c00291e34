"""kill -9 of the host agent, alone and with pagers: VMs go on, the next command takes them over as they were.

The host agent is a process of its own, as users have it. What the guest does meanwhile it tells on a disk, so nothing
that died is needed to know it.
"""

from __future__ import annotations

import asyncio
import json
import signal
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import pytest
import pytest_asyncio

from hva_host.agent.client import ControlClient
from hva_host.agent.model import ReclaimResult, VmState, VmStatus
from hva_host.agent.records import VmRecord
from hvaqemu.errors import PeerLost
from tests.vm.board import SERIAL, Board, GapLog
from tests.vm.harness import COMPLAINTS, STEP_SECONDS, TREE, until
from tests.vm.host import Host, own_host
from tests.vm.programs import bundle, start_command

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(900)]

_NAME = "orphan"
_STATES = ("unused", "volatile")
#: Bounds of what must be quick, on a machine that does other things beside.
_SOON = 30.0
#: Counters that the ledger keeps.
_COUNTERS = ("refaults", "refault_pages", "epochs", "discarded_pages")


@dataclass
class Orphan:
    """A VM under a host agent that can be killed, and a program in it that reads what was discarded."""

    host: Host
    board: Board

    async def status(self) -> VmStatus:
        """Through the command line, which starts a host agent where there is none."""
        return VmStatus.model_validate_json(await self.host.command("status", _NAME, "--json"))

    async def reclaim(self, epochs: int | None = None) -> ReclaimResult:
        async with self.host.client() as client:
            return await client.reclaim(_NAME, _STATES, epochs, lambda _stats: None)

    async def run(self, *argv: str, stdin: bytes = b"") -> str:
        """What a command in the guest prints, once the guest agent is connected."""
        await self.host.connected(_NAME)
        async with self.host.client() as client:
            done = await client.run(_NAME, argv, STEP_SECONDS, stdin)
        assert done.ok, f"{argv}: {done}"
        return done.stdout.decode()

    def kill_agent(self) -> None:
        """Kill the one there is, and nobody starts another but the next command."""
        (agent,) = self.host.agents()
        assert self.host.send(agent, signal.SIGKILL)

    def kill_pager(self) -> int:
        (pager,) = self.host.pagers()
        assert self.host.send(pager, signal.SIGKILL)
        return pager

    async def gone(self, *pids: int) -> None:
        await until(lambda: not {*pids, *self.host.agents()}.intersection(self.host.processes()), _SOON, "deaths")

    async def order(self, what: str) -> None:
        await self.board.do(what)

    async def discard(self) -> None:
        """Discard what the program reads; it rests until told to go on."""
        await self.order("rest")
        before = (await self.host.pager_status(_NAME))["layer_pages"]
        await self.reclaim()
        assert (await self.host.pager_status(_NAME))["layer_pages"] >= max(before, 4000)

    async def refaults_without_agent(self) -> None:
        """While there is no host agent the guest reads what was discarded, and it is right."""
        assert self.host.agents() == []
        before = await self.host.pager_status(_NAME)
        await self.order("go")
        touches = self.board.touches
        await until(lambda: self.board.touches > touches + 400, STEP_SECONDS, "a guest that reads")
        after = await self.host.pager_status(_NAME)
        assert after["refaults"] - before["refaults"] > 50
        assert after["discarded_pages"] == before["discarded_pages"]
        assert self.board.answer()["problems"] == []
        assert self.host.agents() == []

    async def standstill(self) -> int:
        """Wait until the program in the guest touches no more pages; how many it has."""
        async with asyncio.timeout(STEP_SECONDS):
            while True:
                touches = self.board.touches
                await asyncio.sleep(0.5)
                if self.board.touches <= touches:
                    return touches

    def config(self) -> Any:
        """What is kept of the VM on disk, without what is counted."""
        record = VmRecord.model_validate_json((self.host.runtime / "vms" / _NAME / "vm.json").read_bytes())
        return record.model_dump(exclude={"pager_restarts", "pager_pause_s"})

    async def right(self) -> None:
        """Everything is as if nobody had died."""
        status = await self.status()
        assert (status.state, status.held) == (VmState.RUNNING, [])
        assert self.board.answer()["problems"] == []
        assert not [line for line in (await self.run("dmesg")).splitlines() if COMPLAINTS.search(line)]


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def orphan() -> AsyncIterator[Orphan]:
    with own_host() as host:
        board = Board(host.folder / "board.raw")
        file = host.folder / "vm.yaml"
        file.write_text(
            f"name: {_NAME}\nmemory: 256M\ncpus: 2\nallow_exec: true\n"
            f"boot_timeout: 240s\nextra_disks: [{{path: {board.disk}}}]\n"
        )
        await host.command("up", file)
        made = Orphan(host, board)
        await made.run(*start_command("probe", SERIAL), stdin=bundle())
        await until(lambda: board.touches, STEP_SECONDS, "the program in the guest")
        yield made
        tree = await made.run("sh", "-c", TREE)
        await made.reclaim()
        assert await made.run("sh", "-c", TREE) == tree
        await made.right()
        await host.command("down", _NAME)
        await host.all_gone()


async def test_idle(orphan: Orphan) -> None:
    """Killed while it has nothing to do: the pager answers, the next command finds everything as it was."""
    await orphan.discard()
    before, config = await orphan.status(), orphan.config()
    counters = await orphan.host.pager_status(_NAME)
    orphan.kill_agent()
    await orphan.gone()
    await orphan.refaults_without_agent()
    after = await orphan.status()
    assert orphan.config() == config
    for same in ("pid", "pager_pid", "pager_restarts", "pager_pause_s", "memory_bytes"):
        assert getattr(after, same) == getattr(before, same), same
    now = await orphan.host.pager_status(_NAME)
    assert all(now[name] >= counters[name] for name in _COUNTERS)
    assert after.measure is not None and before.measure is not None
    assert after.measure.refaults > before.measure.refaults
    await orphan.right()


@pytest.mark.parametrize("turn", range(3))
async def test_during_reclaim(orphan: Orphan, turn: int) -> None:
    """Killed inside an epoch: its pages come free, the guest writes on, the next reclaim need not wait for long."""
    await orphan.order("go")
    killed = asyncio.Event()

    async def reclaim(client: ControlClient) -> None:
        while True:
            await client.reclaim(_NAME, _STATES, 1, lambda _stats: None)
            killed.set()

    async with orphan.host.client() as client:
        work = asyncio.create_task(reclaim(client))
        async with asyncio.timeout(STEP_SECONDS):
            await killed.wait()
        await asyncio.sleep(0.03 * turn)
        orphan.kill_agent()
        with pytest.raises(PeerLost):
            async with asyncio.timeout(_SOON):
                await work
    await orphan.gone()
    await orphan.board.beats(20)
    began = time.monotonic()
    await orphan.reclaim(epochs=1)
    assert time.monotonic() - began < _SOON
    await orphan.right()


async def test_during_exec(orphan: Orphan) -> None:
    """Killed while a command runs in the guest: who asked is told, the command ends with its session."""
    async with orphan.host.client() as client:
        script = "echo $$ >/run/asked; exec sleep 600"
        asked = asyncio.create_task(client.run(_NAME, ["sh", "-c", script], 600))
        await orphan.run("sh", "-c", "until test -s /run/asked; do sleep 0.05; done")
        orphan.kill_agent()
        with pytest.raises(PeerLost):
            async with asyncio.timeout(_SOON):
                await asked
    await orphan.gone()
    await orphan.run("sh", "-c", "while test -d /proc/$(cat /run/asked); do sleep 0.05; done")
    await orphan.right()


@pytest.mark.parametrize("delay", [0.0, 0.004, 0.02, 0.06])
async def test_while_a_pager_is_replaced(orphan: Orphan, delay: float) -> None:
    """The pager dies, and a moment later the host agent that starts another. Whatever is there then is one pager."""
    await orphan.discard()
    await orphan.order("go")
    pager = orphan.kill_pager()
    await asyncio.sleep(delay)
    orphan.kill_agent()
    await orphan.gone(pager)
    status = await orphan.status()
    assert orphan.host.pagers() == [status.pager_pid]
    assert status.pager_pid != pager
    await orphan.board.beats(20)
    await orphan.right()


async def test_both_at_once(orphan: Orphan) -> None:
    """Pager and host agent die together: the guest stands still where it touches what is not there, and loses nothing
    until the next command, whenever that is."""
    log = GapLog()
    for wait in (0.0, 2.0):
        await orphan.discard()
        counters, config = await orphan.host.pager_status(_NAME), orphan.config()
        (pager,), (agent,) = orphan.host.pagers(), orphan.host.agents()
        await orphan.order("go")
        killed = time.monotonic()
        orphan.host.send(agent, signal.SIGKILL)
        orphan.host.send(pager, signal.SIGKILL)
        await orphan.gone(pager)
        await asyncio.sleep(wait)
        # Nobody answers: the program comes to stand still.
        touches = await orphan.standstill() if wait else orphan.board.touches
        asked = time.monotonic()
        status = await orphan.status()
        assert status.pager_pid not in (0, pager)
        assert orphan.host.pagers() == [status.pager_pid]
        assert orphan.config() == config
        async with asyncio.timeout(STEP_SECONDS):
            while (answer := orphan.board.answer())["pauses"]["touches"] <= touches + 400:
                log.look(answer)
                await asyncio.sleep(0.05)
        log.look(answer)
        gap = max((gap for gap in log.gaps if gap.began + gap.seconds > killed), key=lambda gap: gap.seconds)
        pause = gap.began + gap.seconds - asked
        print(f"the guest stood still for {gap.seconds:.3f} s, {pause:.3f} s of them after the next command was given")
        assert pause < _SOON
        now = await orphan.host.pager_status(_NAME)
        assert all(now[name] >= counters[name] for name in _COUNTERS)
        await orphan.right()


@pytest.mark.parametrize("until_said", ["starting QEMU", "attaching the pager", "booting the guest"])
async def test_while_a_vm_boots(orphan: Orphan, until_said: str) -> None:
    """Killed while it starts another VM: that one is whole or gone, the first one is not disturbed."""
    file = orphan.host.folder / "late.yaml"
    file.write_text("name: late\nmemory: 192M\nallow_exec: true\nboot_timeout: 240s\n")
    starting = await asyncio.create_subprocess_exec(
        *orphan.host.argv("up", file),
        stderr=asyncio.subprocess.PIPE,
        env=orphan.host.full_environment,
    )
    assert starting.stderr is not None
    try:
        async with asyncio.timeout(STEP_SECONDS):
            while until_said not in (line := (await starting.stderr.readline()).decode()):
                assert line, "it ended before"
            orphan.kill_agent()
            said = (await starting.stderr.read()).decode()
            assert await starting.wait() == 1
    finally:
        with suppress(ProcessLookupError):
            starting.kill()
    assert "Traceback" not in said
    assert "the host agent ended" in said
    listed = {
        each["name"]: VmStatus.model_validate(each) for each in json.loads(await orphan.host.command("ls", "--json"))
    }
    assert listed[_NAME].state is VmState.RUNNING
    if "late" in listed:
        # It had begun to run by then: it boots on, under another host agent.
        await orphan.host.connected("late")
        await orphan.host.command("down", "late")
    assert not (orphan.host.runtime / "vms/late").exists()
    assert not (orphan.host.state / "vms/late").exists()
    assert not [words for words in orphan.host.processes().values() if any(b"guest=late" in word for word in words)]
    await orphan.right()
