"""What a real host agent shows of a real guest: metrics, `hvaqemu top` with somebody at its keys, and qmp-shell."""

from __future__ import annotations

import asyncio
import re
import socket
import sys
import urllib.request
from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest
import pytest_asyncio
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from hva_host.agent.model import VmState, VmStatus
from hvaqemu.units import MiB
from tests.terminal import Terminal
from tests.vm.harness import STEP_SECONDS, TREE
from tests.vm.host import Host, own_host

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(900)]

_NAME = "seen"
_FILE = f"""\
name: {_NAME}
memory: 512M
cpus: 2
allow_exec: true
boot_timeout: 240s
"""


@dataclass
class Seen:
    """A VM under a host agent that serves metrics, as its operator has started it."""

    host: Host
    port: int

    async def metrics(self) -> dict[str, Metric]:
        """What Prometheus would fetch once the VM answers in time, read by its own parser."""

        def fetch() -> str:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=30) as answer:
                return str(answer.read().decode())

        async with asyncio.timeout(STEP_SECONDS):
            while True:
                text = await asyncio.to_thread(fetch)
                found = {family.name: family for family in text_string_to_metric_families(text)}
                if value(found, "hvaqemu_vm_answered"):
                    return found
                # For so long an answer is given to whoever asks.
                await asyncio.sleep(1.1)

    async def status(self) -> VmStatus:
        return VmStatus.model_validate_json(await self.host.command("status", _NAME, "--json"))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def seen() -> AsyncIterator[Seen]:
    with own_host() as host:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = int(free.getsockname()[1])
        words = host.argv("agent", "--metrics", f"127.0.0.1:{port}")
        agent = await asyncio.create_subprocess_exec(*words, env=host.full_environment, stderr=asyncio.subprocess.PIPE)
        assert agent.stderr is not None
        while b"serves" not in (line := await agent.stderr.readline()):
            assert line, "the host agent ended"
        # Its log is nobody's concern here, and must not fill the pipe.
        drain = asyncio.create_task(agent.stderr.read())
        (host.folder / "vm.yaml").write_text(_FILE)
        await host.command("up", host.folder / "vm.yaml")
        yield Seen(host, port)
        await host.command("down", _NAME)
        await host.all_gone()
        async with asyncio.timeout(STEP_SECONDS):
            assert await agent.wait() == 0
            await drain


def value(found: dict[str, Metric], sample: str, **labels: str) -> float:
    wanted = {"vm": _NAME, **labels}
    (only,) = [s.value for f in found.values() for s in f.samples if s.name == sample and s.labels == wanted]
    return only


async def test_metrics_say_what_status_says(seen: Seen) -> None:
    read = ("exec", _NAME, "--timeout", "300s", "--", "sh", "-c", TREE)
    digest = await seen.host.command(*read)
    await seen.host.command("reclaim", _NAME)
    reclaimed = await seen.metrics()
    assert await seen.host.command(*read) == digest
    await asyncio.sleep(1.1)
    found, status = await seen.metrics(), await seen.status()
    assert status.measure is not None
    assert value(found, "hvaqemu_vm_state", state="running") == 1
    assert value(found, "hvaqemu_vm_memory_bytes") == 512 * MiB
    assert abs(value(found, "hvaqemu_vm_backing_bytes") - status.measure.backing_bytes) < 16 * MiB
    assert value(found, "hvaqemu_vm_backing_bytes") > value(reclaimed, "hvaqemu_vm_backing_bytes") + 5 * MiB
    assert value(reclaimed, "hvaqemu_vm_residence_bytes", residence="layer") > 20 * MiB
    assert value(found, "hvaqemu_vm_last_epoch_candidates_bytes") == status.epochs[-1].candidates * 4096
    assert sum(s.value for s in found["hvaqemu_vm_guest_bytes"].samples) == 512 * MiB
    # Reading files again is answered from the image, and whatever was free comes back as zeros.
    refaults = {
        source: value(found, "hvaqemu_vm_refaults_total", source=source) for source in ("zero", "layer", "preserved")
    }
    assert refaults["layer"] > value(reclaimed, "hvaqemu_vm_refaults_total", source="layer")
    assert refaults["zero"] > 0
    assert refaults["preserved"] == 0
    assert sum(refaults.values()) <= status.measure.refaults
    waits = value(found, "hvaqemu_vm_stall_seconds_count")
    assert waits >= sum(refaults.values())
    assert value(found, "hvaqemu_vm_stall_seconds_bucket", le="+Inf") == waits
    # Nearly all of them are shorter than a second, on whatever machine.
    assert value(found, "hvaqemu_vm_stall_seconds_bucket", le="1.6777216") > 0.9 * waits
    assert 0 < value(found, "hvaqemu_vm_stall_seconds_sum") < 60
    for process in ("qemu", "pager"):
        assert value(found, f"hvaqemu_vm_{process}_cpu_seconds_total") > 0
        assert value(found, f"hvaqemu_vm_{process}_memory_bytes") > MiB
    assert not [s for f in found.values() for s in f.samples if re.search("s390x|Linux", str(s.labels))]


async def test_keys_of_top_do_what_they_say(seen: Seen) -> None:
    with Terminal(seen.host.argv("top"), seen.host.full_environment) as top:

        async def press(key: str, says: str) -> VmStatus:
            top.press(key)
            await asyncio.to_thread(top.wait_for, says)
            return await seen.status()

        await asyncio.to_thread(top.wait_for, f"> {_NAME}")
        await press("o", "pages made resident")
        reclaimed = await press("r", "given back")
        assert reclaimed.measure is not None
        assert reclaimed.measure.layer_pages > 5000
        paused = await press("p", "is paused")
        assert paused.state is VmState.PAUSED
        await asyncio.to_thread(top.wait_for, "paused  ")
        assert (await press("p", "goes on")).state is VmState.RUNNING
        await asyncio.to_thread(top.wait_for, "running ")
        await asyncio.to_thread(top.wait_for, "VM_STATE running")
        restored = await press("o", "pages made resident")
        assert restored.measure is not None
        assert restored.measure.layer_pages == 0
        top.press("q")
        assert await asyncio.to_thread(top.ended) == 0
        assert top.is_as_before()
        print(top.text)


async def test_qmp_shell_drives_the_host_agent(seen: Seen) -> None:
    """The shell that comes with QEMU's library, at a terminal."""
    shell = [sys.executable, "-c", "from qemu.qmp.qmp_shell import main; main()", "-p"]
    with Terminal([*shell, seen.host.runtime / "control.sock"], seen.host.full_environment, lines=200) as terminal:

        async def type_in(line: str, *says: str) -> None:
            terminal.press(f"{line}\n")
            for text in says:
                await asyncio.to_thread(terminal.wait_for, text)

        await asyncio.to_thread(terminal.wait_for, "Connected to QEMU 0.1.0")
        await type_in("query-version", '"package": "hvaqemu 0.1.0"')
        await type_in(f"vm-status name={_NAME}", '"guest_kernel": "', '"state": "running"')
        await type_in(f"vm-reclaim name={_NAME} states=['unused'] epochs=1", '"backing_after_bytes": ')
        # What was told meanwhile comes before the next prompt.
        await type_in("", "EPOCH")
        await type_in("vm-status name=nobody", '"class": "ConfigError"', "no such VM")
        await type_in(f"vm-qmp name={_NAME} command=query-status", '"running": true')
        terminal.press("\x04")
        assert await asyncio.to_thread(terminal.ended) == 0
