from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from hva_host.agent.client import AgentFailed, ControlClient, NotServed
from hva_host.agent.control import CONTROL_SOCKET
from hvaqemu.config import VmConfig
from hvaqemu.errors import ConfigError, DeadlineExceeded, GuestError, PeerLost, ProtocolError, RefusedError
from hvaqemu.qemu import sockets
from tests.unit.control_stand_ins import Served, short_folder


@asynccontextmanager
async def connected(path: Path) -> AsyncIterator[ControlClient]:
    client = await ControlClient.connect(path, 10)
    try:
        yield client
    finally:
        await client.close()


async def test_a_vm_from_up_to_down(control_socket: Served) -> None:
    said: list[str] = []
    epochs: list[dict[str, Any]] = []
    config = VmConfig(name="one", memory=256 << 20, allow_exec=True, boot_timeout=7.5)
    async with connected(control_socket.path) as client:
        status = await client.up(config, said.append)
        assert (status.name, said) == ("one", ["starting QEMU"])
        vm = control_socket.fleet.machines["one"]
        assert vm.config == config
        assert await client.vms() == [status]
        result = await client.reclaim("one", ["unused"], 2, epochs.append)
        assert [stats["number"] for stats in epochs] == [1, 2] == [stats.number for stats in result.epochs]
        done = await client.run("one", ["cat", "-v"], 5.0, b"\0in")
        assert (done.stdout, done.exit_status) == (b"out\n", 0)
        assert vm.asked == [(("unused",), 2), (("cat", "-v"), 5.0, b"\0in")]
        vm.go_on.set()
        assert await client.restore("one") == 768
        assert await client.resume("one") == 0
        assert await client.console("one") == vm.console_log
        assert await client.down("one") == "the guest shut down"
        assert await client.vms() == []


async def test_errors_are_raised_as_what_they_were(control_socket: Served) -> None:
    control_socket.fleet.add("closed")
    control_socket.fleet.add("open", allow_exec=True)
    async with connected(control_socket.path) as client:
        with pytest.raises(ConfigError, match="VM two: no such VM") as unknown:
            await client.status("two")
        assert unknown.value.hint == "known: none is running"
        with pytest.raises(RefusedError, match="allow_exec"):
            await client.run("closed", ["ls"], 5)
        with pytest.raises(GuestError, match="no such program"):
            await client.run("open", ["missing"], 5)
        with pytest.raises(AgentFailed, match="ZeroDivisionError"):
            await client.run("open", ["bug"], 5)
        with pytest.raises(ProtocolError, match="vm-fly"):
            await client.execute("vm-fly")


async def test_no_host_agent(tmp_path: Path) -> None:
    with pytest.raises(NotServed):
        await ControlClient.connect(tmp_path / "none.sock", 5)
    with short_folder() as folder:
        sockets.listen(folder / "dead.sock").close()
        with pytest.raises(NotServed):
            await ControlClient.connect(folder / "dead.sock", 5)


async def test_a_host_agent_that_does_not_greet() -> None:
    with (
        short_folder() as folder,
        sockets.listen(folder / CONTROL_SOCKET),
        pytest.raises(DeadlineExceeded, match="greeting"),
    ):
        await ControlClient.connect(folder / CONTROL_SOCKET, 0.2)


async def test_a_host_agent_that_ends_meanwhile(control_socket: Served) -> None:
    vm = control_socket.fleet.add("one")
    async with connected(control_socket.path) as client:
        restoring = asyncio.create_task(client.restore("one"))
        await asyncio.wait_for(vm.restoring.wait(), 10)
        await control_socket.server.close()
        with pytest.raises(PeerLost, match="vm-restore"):
            await asyncio.wait_for(restoring, 10)
        with pytest.raises(PeerLost):
            await asyncio.wait_for(client.vms(), 10)


async def test_a_deadline_of_the_clients_own(control_socket: Served) -> None:
    vm = control_socket.fleet.add("one")
    async with connected(control_socket.path) as client:
        with pytest.raises(DeadlineExceeded, match="vm-restore"):
            await client.execute("vm-restore", {"name": "one"}, timeout=0.2)
    # Hanging up is what cancels it.
    await asyncio.wait_for(vm.cancelled.wait(), 10)
