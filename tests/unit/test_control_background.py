"""Host agents as real processes, in runtime directories of their own, without VMs."""

from __future__ import annotations

import asyncio
import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from hva_host.agent.background import LOG_FILE, connect_or_start
from hva_host.agent.client import ControlClient
from hva_host.agent.control import CONTROL_SOCKET
from hva_host.agent.service import AlreadyServed, RuntimeLock
from hvaqemu.errors import LaunchError, PeerLost
from hvaqemu.qemu import sockets
from tests.unit.control_stand_ins import short_folder

_MAIN = (sys.executable, "-m", "hva_host.cli.main")


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with short_folder() as folder:
        monkeypatch.setenv("HVAQEMU_RUNTIME_DIR", str(folder))
        monkeypatch.setenv("HVAQEMU_STATE_DIR", str(folder / "state"))
        yield folder
        asyncio.run(_end(folder))


async def _end(runtime: Path) -> None:
    """End the host agent there may be, and wait until it has gone."""
    with suppress(PeerLost):
        client = await ControlClient.connect(runtime / CONTROL_SOCKET, 10)
        with suppress(PeerLost):
            await client.quit()
        await client.close()
    await _free(runtime)


async def _free(runtime: Path) -> None:
    """Wait until no process holds the lock of the runtime directory."""
    async with asyncio.timeout(20):
        while True:
            with suppress(AlreadyServed):
                RuntimeLock(runtime).release()
                return
            await asyncio.sleep(0.02)


def _owner(runtime: Path) -> int:
    return int((runtime / "agent.lock").read_text())


async def test_it_is_started_once_and_outlives_who_started_it(runtime: Path) -> None:
    clients = await asyncio.gather(*(connect_or_start(runtime, 60) for _ in range(4)))
    for client in clients:
        assert await client.vms() == []
        await client.close()
    owner = _owner(runtime)
    assert os.getsid(owner) == owner
    # The starter's end of the pipe is closed; whoever writes there would end.
    assert os.readlink(f"/proc/{owner}/fd/1") == "/dev/null"  # noqa: PTH115
    again = await connect_or_start(runtime, 10)
    await again.close()
    assert _owner(runtime) == owner


async def test_a_second_one_refuses_in_one_line(runtime: Path) -> None:
    await (await connect_or_start(runtime, 60)).close()
    second = await asyncio.create_subprocess_exec(*_MAIN, "agent", stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    output, _ = await asyncio.wait_for(second.communicate(), 30)
    assert second.returncode == 1
    assert output.decode().count("\n") == 1
    assert f"a host agent runs already, process {_owner(runtime)}" in output.decode()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_signals_end_it_in_good_order(runtime: Path, number: signal.Signals) -> None:
    process = await asyncio.create_subprocess_exec(*_MAIN, "agent", stderr=subprocess.PIPE)
    assert process.stderr is not None
    assert b"serves" in await asyncio.wait_for(process.stderr.readline(), 30)
    process.send_signal(number)
    assert await asyncio.wait_for(process.wait(), 20) == 0
    assert not (runtime / CONTROL_SOCKET).exists()


async def test_one_that_was_killed_is_replaced(runtime: Path) -> None:
    await (await connect_or_start(runtime, 60)).close()
    killed = _owner(runtime)
    os.kill(killed, signal.SIGKILL)
    await _free(runtime)
    assert (runtime / CONTROL_SOCKET).exists()
    await (await connect_or_start(runtime, 60)).close()
    assert _owner(runtime) != killed


async def test_what_keeps_it_from_starting_is_said(runtime: Path) -> None:
    (runtime / CONTROL_SOCKET).mkdir()
    (runtime / LOG_FILE).write_text("an older complaint\n")
    with pytest.raises(LaunchError, match=r"could not be started: /.*control.sock: Is a directory") as caught:
        await connect_or_start(runtime, 60)
    assert "older complaint" not in str(caught.value)
    assert "\n" not in str(caught.value)


async def test_who_finds_the_place_taken_waits_for_its_owner(runtime: Path) -> None:
    program = (
        "import fcntl, os, sys, time; f = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT); fcntl.lockf(f, fcntl.LOCK_EX)"
        "; print('locked', flush=True); sys.stdin.read()"
    )
    holder = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", program, str(runtime / "agent.lock")), stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holder.stdin is not None
    assert holder.stdout is not None
    try:
        assert await holder.stdout.readline() == b"locked\n"
        starting = asyncio.create_task(connect_or_start(runtime, 60))
        done, _ = await asyncio.wait({starting}, timeout=1.5)
        assert not done
        holder.stdin.close()
        await (await starting).close()
    finally:
        if holder.returncode is None:
            holder.stdin.close()
            await holder.wait()


async def test_clients_wait_while_it_gets_ready() -> None:
    with short_folder() as runtime, sockets.listen(runtime / CONTROL_SOCKET) as listener:
        connecting = asyncio.create_task(connect_or_start(runtime, 30))
        loop = asyncio.get_running_loop()
        listener.setblocking(False)
        connection, _ = await asyncio.wait_for(loop.sock_accept(listener), 10)
        assert not connecting.done()
        with connection:
            connection.sendall(b'{"QMP": {"version": {}, "capabilities": []}}\n{"return": {}}\n')
            await (await asyncio.wait_for(connecting, 10)).close()


def test_the_lock_is_this_processs_own_and_not_its_childrens(runtime: Path) -> None:
    lock = RuntimeLock(runtime)
    child = subprocess.Popen(
        [sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE, close_fds=False
    )
    try:
        lock.release()
        descriptor = os.open(runtime / "agent.lock", os.O_RDWR)
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(descriptor)
    finally:
        child.communicate()
