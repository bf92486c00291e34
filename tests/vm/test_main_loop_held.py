"""QEMU's own main loop waits for a page that must not be served: QMP is silent, and everything an operator needs works.

Commands are processes of their own, as users run them; host agents are killed and adopt the VM as it stands.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
import pytest_asyncio
from qemu.qmp import QMPClient
from qemu.qmp.error import QMPError

from hva_host.agent.model import VmStatus
from hvaqemu.pages import PAGE_SIZE
from hvaqemu.qemu.launch import QMP_SOCKET
from hvaqemu.units import MiB
from tests.vm.betrayal import Dependants, Golden
from tests.vm.harness import STEP_SECONDS, TREE, until
from tests.vm.host import Host, own_host

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(600)]

_NAME = "stuck"
_MEMORY = 256 * MiB
_VM = f"name: {_NAME}\nmemory: 256M\nallow_exec: true\nboot_timeout: 240s\n"
_SECONDS = 300.0
#: A command is a Python process of its own, and may have to start a host agent that adopts the VM first.
_AT_ONCE = 12.0
#: `down` can be given only once. Where a QEMU that can not hear is asked before it is killed, that takes 12 s more.
_DOWN = 15.0


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Golden:
    return Golden(tmp_path_factory.mktemp("golden"))


@pytest.fixture(scope="module")
def host(golden: Golden) -> Iterator[Host]:
    with own_host() as made:
        made.environment["HVAQEMU_CACHE_DIR"] = str(golden.cache)
        yield made


async def timed(host: Host, *words: str) -> tuple[subprocess.CompletedProcess[str], float]:
    """A command that may fail, and the seconds it took."""
    began = time.monotonic()
    done = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-m", "hva_host.cli.main", *words],
        capture_output=True,
        text=True,
        env={**os.environ, **host.environment},
        timeout=_SECONDS,
    )
    assert "Traceback" not in done.stderr
    return done, time.monotonic() - began


async def typed(host: Host, *words: str) -> subprocess.CompletedProcess[str]:
    """A command that may fail, that does the same when given again, and that must not wait."""
    done, seconds = await timed(host, *words)
    if _AT_ONCE < seconds < 2 * _AT_ONCE:
        # The host may have been busy for once; what waits for something does so again.
        done, seconds = await timed(host, *words)
    assert seconds < _AT_ONCE, f"{words}: {seconds:.1f} s, {done}"
    return done


async def down(host: Host, name: str) -> str:
    """End a VM, which must be quick; what the command says."""
    done, seconds = await timed(host, "down", name)
    print(f"down took {seconds:.1f} s")
    assert seconds < _DOWN, f"{seconds:.1f} s, {done}"
    assert done.returncode == 0
    assert done.stderr.startswith(f"{name} is down: ")
    return done.stderr


class Stuck:
    """A VM whose golden image was altered after its pages were discarded, in one block, so that nobody but QEMU's main
    loop comes to wait."""

    def __init__(self, host: Host, golden: Golden, digest: str) -> None:
        qemu = host.qemu()
        assert qemu is not None
        self.host = host
        self.golden = golden
        self.digest = digest
        self.qemu = qemu
        dependants = Dependants(qemu, _MEMORY)
        assert len(dependants.pfns) > 5_000
        #: The altered block, and a page with it that the main loop is made to touch: none before :meth:`betrayed`.
        self.block, self.page = dependants.blocks[:0], -1
        self.saved = host.folder / "saved"

    def kill_agent(self) -> None:
        (agent,) = self.host.agents()
        assert self.host.send(agent, signal.SIGKILL)

    @asynccontextmanager
    async def monitor(self) -> AsyncIterator[QMPClient]:
        """QMP, which serves one client: there must be no host agent."""
        client = QMPClient("test")
        async with asyncio.timeout(20):
            await client.connect(str(self.host.runtime / "vms" / _NAME / QMP_SOCKET))
        try:
            yield client
        finally:
            with suppress(QMPError, EOFError, OSError):
                await client.disconnect()

    async def stop_main_loop(self) -> None:
        """Have QEMU's main loop read a page that can not be served; a fault of its own, which no vCPU waits for."""
        self.saved.unlink(missing_ok=True)
        async with self.monitor() as client:
            where = {"val": self.page * PAGE_SIZE, "size": PAGE_SIZE, "filename": str(self.saved)}
            saving = asyncio.create_task(client.execute("pmemsave", where))
            asked = asyncio.create_task(client.execute("query-status"))
            done, _ = await asyncio.wait({saving, asked}, timeout=3)
            assert not done, "the main loop does not wait"
            for task in (saving, asked):
                task.cancel()
            await asyncio.wait({saving, asked})

    async def betrayed(self) -> None:
        """Alter a block that a page still depends on once that is done: the guest goes on meanwhile."""
        async with asyncio.timeout(_SECONDS):
            while True:
                self.block = Dependants(self.qemu, _MEMORY).blocks[-1:]
                await self.golden.alter(self.block)
                if left := Dependants(self.qemu, _MEMORY).on(self.block):
                    self.page = max(left)
                    return
                await self.repaired()

    async def repaired(self) -> None:
        await self.golden.repair(self.block)


@pytest_asyncio.fixture(loop_scope="module")
async def stuck(host: Host, golden: Golden) -> AsyncIterator[Stuck]:
    file = host.folder / "vm.yaml"
    file.write_text(_VM)
    if host.qemu() is None:
        await host.command("up", file)
    digest = await host.command("exec", _NAME, "--timeout", "200s", "--", "sh", "-c", TREE)
    await host.command("reclaim", _NAME)
    made = Stuck(host, golden, digest)
    # Nobody is there to be told: what happens next is found by who adopts the VM.
    made.kill_agent()
    try:
        await made.betrayed()
        yield made
    finally:
        await made.repaired()
        # One that goes on, and is trusted again, serves the next test too.
        if host.qemu() is not None and not await is_well(host):
            await host.command("down", _NAME)


async def is_well(host: Host) -> bool:
    """Whether the VM runs and can be reclaimed from."""
    if (await typed(host, "resume", _NAME)).returncode:
        return False
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        status = VmStatus.model_validate(json.loads((await typed(host, "status", _NAME, "--json")).stdout))
        if status.state == "running" and status.guest_connected and not status.reclaim_refused:
            return True
    return False


async def is_held(stuck: Stuck, pages: set[int]) -> VmStatus:
    """Every command says so, for one of these pages, at once, with its exit code."""
    host, root = stuck.host, str(stuck.golden.root)
    listed = await typed(host, "ls")
    assert listed.returncode == 1
    assert "HELD" in listed.stdout
    assert root in listed.stdout
    assert listed.stderr.startswith(f"hvaqemu: VM {_NAME}: HELD, ")
    assert listed.stderr.count("\n") == 1
    shown = await typed(host, "status", _NAME, "--json")
    assert shown.returncode == 1
    status = VmStatus.model_validate(json.loads(shown.stdout))
    assert status.state == "held"
    assert [held.layer for held in status.held] == [root] * len(status.held)
    assert pages & {page for held in status.held for page in held.pages}
    assert (await typed(host, "status", _NAME)).returncode == 1
    assert re.search(rf"WARNING .*VM_HELD .*{re.escape(root)}", (host.runtime / "agent.log").read_text())
    for words in (["reclaim"], ["restore"], ["exec", "--timeout", "200s", "--", "true"]):
        refused = await typed(host, words[0], _NAME, *words[1:])
        assert refused.returncode == 1
        assert refused.stderr.startswith(f"hvaqemu: VM {_NAME} is HELD: ")
        assert root in refused.stderr
        assert f"hvaqemu resume {_NAME}" in refused.stderr
        assert refused.stderr.count("\n") == 1
    return status


@pytest.mark.timeout(600)
async def test_commands_adoption_and_resume(stuck: Stuck) -> None:
    await stuck.stop_main_loop()
    status = await is_held(stuck, {stuck.page})
    # Adopted again, with another pager, in that state.
    stuck.kill_agent()
    (pager,) = stuck.host.pagers()
    assert stuck.host.send(pager, signal.SIGKILL)
    assert (await is_held(stuck, {stuck.page})).pager_pid != status.pager_pid
    still = await typed(stuck.host, "resume", _NAME)
    assert still.returncode == 1
    assert "still held" in still.stderr
    assert not stuck.saved.exists() or stuck.saved.stat().st_size == 0
    await stuck.repaired()
    resumed = await typed(stuck.host, "resume", _NAME)
    assert resumed.returncode == 0, resumed.stderr
    await until(lambda: stuck.saved.exists() and stuck.saved.stat().st_size == PAGE_SIZE, 20, "QEMU's main loop")
    with stuck.golden.root.open("rb") as file:
        assert stuck.saved.read_bytes() == os.pread(file.fileno(), PAGE_SIZE, int(stuck.block[0]) * PAGE_SIZE)
    deadline = time.monotonic() + 60
    while (shown := await typed(stuck.host, "ls", "--json")).returncode or '"running"' not in shown.stdout:
        assert time.monotonic() < deadline, shown
    await wait_connected(stuck)
    digest = await stuck.host.command("exec", _NAME, "--timeout", "200s", "--", "sh", "-c", TREE)
    assert digest == stuck.digest


async def wait_connected(stuck: Stuck) -> None:
    """Wait until the guest's agent has greeted the host agent."""
    deadline = time.monotonic() + 60
    while '"guest_connected": true' not in (await typed(stuck.host, "ls", "--json")).stdout:
        assert time.monotonic() < deadline


async def test_a_vcpu_waits_and_the_host_agent_is_killed(stuck: Stuck) -> None:
    """The guest was stopped for the hold by a host agent that is no more; the next one lets it go on."""
    dependants = Dependants(stuck.qemu, _MEMORY)
    blocks = dependants.some_blocks(8)
    await wait_connected(stuck)
    reading = asyncio.create_task(
        asyncio.to_thread(
            subprocess.run,
            [sys.executable, "-m", "hva_host.cli.main", "exec", _NAME, "--timeout", "200s", "--", "sh", "-c", TREE],
            capture_output=True,
            env={**os.environ, **stuck.host.environment},
            timeout=_SECONDS,
        )
    )
    record = stuck.host.runtime / "vms" / _NAME / "vm.json"
    await stuck.golden.alter(blocks)
    try:
        await until(lambda: json.loads(record.read_text())["paused_for_hold"], 60, "a guest that is stopped")
        stuck.kill_agent()
        assert (await reading).returncode == 1
        await is_held(stuck, dependants.on(blocks))
        await is_held(stuck, dependants.on(blocks))
    finally:
        await stuck.golden.repair(blocks)
        await stuck.repaired()
    resumed = await typed(stuck.host, "resume", _NAME)
    assert resumed.returncode == 0, resumed.stderr
    await until(lambda: not json.loads(record.read_text())["paused_for_hold"], 20, "a guest that goes on")
    await wait_connected(stuck)
    digest = await stuck.host.command("exec", _NAME, "--timeout", "200s", "--", "sh", "-c", TREE)
    assert digest == stuck.digest


@pytest.mark.parametrize("how", ["held", "held, adopted before", "stopped by a signal"])
async def test_down_is_quick_whatever_qemu_does(stuck: Stuck, how: str) -> None:
    if how == "held, adopted before":
        # Whether the guest has touched the altered block by then is its own affair.
        await typed(stuck.host, "ls")
        stuck.kill_agent()
    if how == "stopped by a signal":
        assert stuck.host.send(stuck.qemu, signal.SIGSTOP)
    else:
        await stuck.stop_main_loop()
    said = await down(stuck.host, _NAME)
    if how != "stopped by a signal":
        assert "SIGKILL" in said
    await stuck.host.all_gone()


async def test_down_while_it_starts_and_after_its_agent_was_killed(host: Host) -> None:
    file = host.folder / "half.yaml"
    file.write_text(_VM.replace(_NAME, "half"))
    environment = {**os.environ, **host.environment}
    argv = [sys.executable, "-m", "hva_host.cli.main", "up", str(file)]
    for killed in (False, True):
        up = await asyncio.create_subprocess_exec(*argv, env=environment, stderr=subprocess.PIPE)
        assert up.stderr is not None
        async with asyncio.timeout(200):
            while b"booting the guest" not in (line := await up.stderr.readline()):
                assert line, "it ended before"
        if killed:
            for agent in host.agents():
                host.send(agent, signal.SIGKILL)
        await down(host, "half")
        said = (await up.stderr.read()).decode()
        assert await up.wait() == 1
        assert killed or "was ended by 'hvaqemu down' while it was starting" in said
        await until(lambda: host.qemu() is None, STEP_SECONDS, "the end of QEMU")
        assert not Path(host.runtime / "vms/half").exists()
    await host.all_gone()
