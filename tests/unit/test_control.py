from __future__ import annotations

import asyncio
import base64
import json
import os
import socket
import stat
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from qemu.qmp import ExecuteError, QMPClient
from qemu.qmp.message import Message

from hva_host.agent import control
from hva_host.agent.model import VmStatus
from tests.unit.control_stand_ins import MEASURE, Served


@asynccontextmanager
async def qmp(path: Path) -> AsyncIterator[QMPClient]:
    client = QMPClient("test")
    await client.connect(str(path))
    try:
        yield client
    finally:
        await client.disconnect()


class Raw:
    """A client that writes what it likes."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def say(self, text: str | bytes) -> None:
        self.writer.write(text.encode() if isinstance(text, str) else text)
        await self.writer.drain()

    async def hear(self) -> dict[str, Any]:
        line = await asyncio.wait_for(self.reader.readline(), 10)
        assert line, "hung up"
        answer: dict[str, Any] = json.loads(line)
        return answer

    async def ask(self, text: str | bytes) -> dict[str, Any]:
        await self.say(text)
        return await self.hear()


@asynccontextmanager
async def raw(path: Path, *, negotiate: bool = True) -> AsyncIterator[Raw]:
    reader, writer = await asyncio.open_unix_connection(str(path), limit=1 << 24)
    client = Raw(reader, writer)
    try:
        if negotiate:
            await client.hear()
            await client.ask('{"execute": "qmp_capabilities"}')
        yield client
    finally:
        writer.close()


async def test_the_greeting_is_qmps_and_negotiation_comes_first(control_socket: Served) -> None:
    async with raw(control_socket.path, negotiate=False) as client:
        greeting = (await client.hear())["QMP"]
        assert set(greeting["version"]["qemu"]) == {"major", "minor", "micro"}
        assert greeting["version"]["package"].startswith("hvaqemu")
        assert greeting["capabilities"] == []
        early = await client.ask('{"execute": "query-vms", "id": 1}')
        assert early["error"]["class"] == "CommandNotFound"
        assert early["id"] == 1
        oob = await client.ask('{"execute": "qmp_capabilities", "arguments": {"enable": ["oob"]}}')
        assert oob["error"]["class"] == "GenericError"
        assert await client.ask('{"execute": "qmp_capabilities", "id": {"any": "thing"}}') == {
            "return": {},
            "id": {"any": "thing"},
        }
        assert (await client.ask('{"execute": "qmp_capabilities"}'))["error"]["class"] == "CommandNotFound"
        assert await client.ask('{"execute": "query-vms"}') == {"return": []}


async def test_the_library_for_qmp_is_a_client(control_socket: Served) -> None:
    vm = control_socket.fleet.add("one", allow_exec=True)
    control_socket.fleet.add("another")
    async with qmp(control_socket.path) as client:
        names = [command["name"] for command in await client.execute("query-commands")]  # type: ignore[attr-defined]
        assert {"query-vms", "vm-up", "vm-down", "vm-reclaim", "vm-exec", "quit", "qmp_capabilities"} <= set(names)
        listed = await client.execute("query-vms")
        assert [VmStatus.model_validate(each).name for each in listed] == ["another", "one"]  # type: ignore[attr-defined]
        assert await client.execute("vm-measure", {"name": "one"}) == MEASURE.model_dump(mode="json")
        report = await client.execute("vm-report", {"name": "one"})
        assert [sample["at_s"] for sample in report["timeline"]] == [1.0, 12.5]  # type: ignore[index]
        answer = await client.execute("vm-qmp", {"name": "one", "command": "query-status"})
        assert answer == {"return": [{"said": "na\u00efve \x9b31m"}]}
        assert await client.execute("vm-balloon", {"name": "one", "size": "128M"}) == {"bytes": 128 << 20}
        done = await client.execute(
            "vm-exec", {"name": "one", "argv": ["cat"], "timeout": "2m", "stdin": base64.b64encode(b"\0\xff").decode()}
        )
        assert isinstance(done, dict)
        assert base64.b64decode(done["stdout"]) == b"out\n"
        assert vm.asked[-1] == (("cat",), 120.0, b"\0\xff")


@pytest.mark.parametrize(
    ("command", "arguments", "says"),
    [
        ("vm-status", {}, "name: is missing"),
        ("vm-status", {"name": "one", "verbose": True}, "verbose: there is no such argument"),
        ("vm-status", {"name": "../one"}, "name: must be 1 to 63 letters"),
        ("vm-status", {"name": 7}, "name: "),
        ("vm-reclaim", {"name": "one", "states": ["precious"]}, "states.0"),
        ("vm-reclaim", {"name": "one", "states": []}, "states"),
        ("vm-reclaim", {"name": "one", "epochs": 0}, "epochs"),
        ("vm-exec", {"name": "one", "argv": []}, "argv"),
        ("vm-exec", {"name": "one", "argv": ["a\0b"]}, "NUL"),
        ("vm-exec", {"name": "one", "argv": ["cat"], "stdin": "?"}, "base64"),
        ("vm-exec", {"name": "one", "argv": ["cat"], "timeout": "-1s"}, "timeout"),
        ("vm-up", {"config": {"name": "x", "memory": "512M", "cpu": 2}}, "config.cpu"),
        ("query-vms", {"x": 1}, "there is no such argument"),
    ],
)
async def test_wrong_arguments_are_named(
    control_socket: Served, command: str, arguments: dict[str, object], says: str
) -> None:
    control_socket.fleet.add("one", allow_exec=True)
    async with qmp(control_socket.path) as client:
        with pytest.raises(ExecuteError) as caught:
            await client.execute(command, arguments)
    assert caught.value.error_class == "ConfigError"
    assert str(caught.value).startswith(f"{command}: argument ")
    assert says in str(caught.value)


async def test_errors_carry_class_and_hint_and_bugs_are_told_apart(
    control_socket: Served, caplog: pytest.LogCaptureFixture
) -> None:
    control_socket.fleet.add("closed")
    control_socket.fleet.add("open", allow_exec=True)
    async with raw(control_socket.path) as client:
        refused = await client.ask('{"execute": "vm-exec", "arguments": {"name": "closed", "argv": ["ls"]}}')
        assert refused["error"] == {
            "class": "RefusedError",
            "desc": "VM closed: commands in the guest are off",
            "hint": "set allow_exec: true in its file",
        }
        bug = await client.ask('{"execute": "vm-exec", "arguments": {"name": "open", "argv": ["bug"]}}')
        assert bug["error"] == {"class": "InternalError", "desc": "vm-exec: ZeroDivisionError: of ours"}
        assert "Traceback" in caplog.text
        assert (await client.ask('{"execute": "vm-fly"}'))["error"]["class"] == "CommandNotFound"
        assert (await client.ask('{"execute": 1}'))["error"]["class"] == "GenericError"
        assert (await client.ask('{"run": "x", "id": 9}'))["id"] == 9
        assert (await client.ask("{nonsense}"))["error"]["class"] == "GenericError"
        assert (await client.ask('{"execute": "query-vms"}'))["return"]


async def test_commands_without_line_ends_are_answered_in_order(control_socket: Served) -> None:
    async with raw(control_socket.path) as client:
        await client.say("".join(f'{{"execute":"query-version","id":{number}}}' for number in range(40)))
        assert [(await client.hear())["id"] for _ in range(40)] == list(range(40))


async def test_a_slow_command_keeps_nobody_else_waiting(control_socket: Served) -> None:
    vm = control_socket.fleet.add("slow")
    async with qmp(control_socket.path) as waiting, qmp(control_socket.path) as other:
        slow = asyncio.create_task(waiting.execute("vm-restore", {"name": "slow"}))
        await asyncio.wait_for(vm.restoring.wait(), 10)
        assert await asyncio.wait_for(other.execute("vm-status", {"name": "slow"}), 10)
        assert not slow.done()
        vm.go_on.set()
        assert await asyncio.wait_for(slow, 10) == {"pages": 768}


async def test_events_reach_all_who_have_negotiated(control_socket: Served) -> None:
    control_socket.fleet.add("one")
    async with (
        qmp(control_socket.path) as asking,
        qmp(control_socket.path) as watching,
        raw(control_socket.path, negotiate=False) as silent,
    ):
        await silent.hear()
        await asking.execute("vm-reclaim", {"name": "one", "epochs": 3})
        await asking.execute("vm-up", {"config": {"name": "two", "memory": "256M"}})
        for client in (asking, watching):
            events = [await asyncio.wait_for(client.events.get(), 10) for _ in range(4)]
            assert [event["event"] for event in events] == ["EPOCH"] * 3 + ["VM_PROGRESS"]
            assert [_data(event)["stats"]["number"] for event in events[:3]] == [1, 2, 3]
            assert _data(events[3]) == {"name": "two", "text": "starting QEMU"}
            assert set(events[0]["timestamp"]) == {"seconds", "microseconds"}  # type: ignore[call-overload]
        # The next thing this one hears is the answer to its own question.
        assert "return" in await silent.ask('{"execute": "qmp_capabilities"}')


def _data(event: Message) -> dict[str, Any]:
    data = event["data"]
    assert isinstance(data, dict)
    return data


async def test_hanging_up_cancels_the_command(control_socket: Served) -> None:
    vm = control_socket.fleet.add("slow")
    async with raw(control_socket.path) as client:
        await client.say('{"execute": "vm-restore", "arguments": {"name": "slow"}}')
        await asyncio.wait_for(vm.restoring.wait(), 10)
    await asyncio.wait_for(vm.cancelled.wait(), 10)


async def test_a_vm_that_is_being_ended_is_ended_even_if_nobody_waits(control_socket: Served) -> None:
    fleet = control_socket.fleet
    fleet.add("one")
    fleet.go_down.clear()
    async with raw(control_socket.path) as client:
        await client.say('{"execute": "vm-down", "arguments": {"name": "one"}}')
        await asyncio.wait_for(fleet.downing.wait(), 10)
    async with qmp(control_socket.path) as client2:
        assert await client2.execute("vm-status", {"name": "one"})
        fleet.go_down.set()
        for _ in range(100):
            if "one" not in fleet.machines:
                break
            await client2.execute("query-version")
    assert "one" not in fleet.machines


async def test_a_client_that_does_not_read_is_dropped_and_others_are_not(control_socket: Served) -> None:
    server = control_socket.server
    with socket.socket(socket.AF_UNIX) as deaf:
        deaf.connect(str(control_socket.path))
        deaf.sendall(b'{"execute": "qmp_capabilities"}')
        async with qmp(control_socket.path) as other:
            # The kernel's buffers are full long before the server's queue is.
            sent = 0
            while len(server._sessions) == 2 and sent < control._OUTGOING_MAX * 2:
                server.emit("NOISE", {"text": "x" * 4096})
                await asyncio.wait_for(other.events.get(), 10)
                sent += 1
            assert len(server._sessions) == 1
            assert sent >= control._OUTGOING_MAX
            assert await other.execute("query-version")
        deaf.settimeout(10)
        while deaf.recv(1 << 16):
            pass


async def test_a_message_without_end_is_refused(control_socket: Served) -> None:
    async with raw(control_socket.path) as client:
        answer = asyncio.create_task(client.hear())
        with pytest.raises(ConnectionError):
            await client.say('{"execute": "' + "x" * (1 << 21))
            while True:
                await client.say("x" * 65536)
        assert "bytes" in (await answer)["error"]["desc"]


async def test_only_its_owner_gets_in(control_socket: Served) -> None:
    assert stat.S_IMODE(control_socket.path.stat().st_mode) == 0o600
    if os.geteuid() != 0:
        pytest.skip("needs root, to be somebody else")
    control_socket.path.parent.chmod(0o755)
    control_socket.path.chmod(0o666)
    program = "import socket,sys; s=socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); print(len(s.recv(100)))"
    for user, heard in ((65534, b"0\n"), (0, b"100\n")):
        process = await asyncio.create_subprocess_exec(
            *("/usr/bin/python3", "-c", program, str(control_socket.path)),
            stdout=subprocess.PIPE,
            user=user,
            cwd="/",
        )
        output, _ = await asyncio.wait_for(process.communicate(), 20)
        assert output == heard


async def test_quit_is_answered_and_closing_hangs_up(control_socket: Served) -> None:
    vm = control_socket.fleet.add("slow")
    async with raw(control_socket.path) as client, raw(control_socket.path) as busy:
        await busy.say('{"execute": "vm-restore", "arguments": {"name": "slow"}}')
        await asyncio.wait_for(vm.restoring.wait(), 10)
        assert await client.ask('{"execute": "quit"}') == {"return": {}}
        assert control_socket.stop.is_set()
        await asyncio.wait_for(control_socket.server.close(), 10)
        assert not control_socket.path.exists()
        assert vm.cancelled.is_set()
        for each in (client, busy):
            assert await asyncio.wait_for(each.reader.read(), 10) == b""


async def test_qmp_shell_works_on_it(control_socket: Served) -> None:
    control_socket.fleet.add("one")
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", "from qemu.qmp.qmp_shell import main; main()", "-p", str(control_socket.path)),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "HOME": str(control_socket.path.parent)},
    )
    script = b"query-vms\nvm-reclaim name=one states=['unused'] epochs=1\nvm-status name=two\n"
    output, _ = await asyncio.wait_for(process.communicate(script), 60)
    text = output.decode()
    assert "Connected to QEMU 0.1.0" in text
    assert '"name": "one"' in text
    assert '"backing_after_bytes": 104857600' in text
    assert "VM two: no such VM" in text
    assert process.returncode == 0
