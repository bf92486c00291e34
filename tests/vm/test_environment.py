"""VMs that can not be paged safely, from the start or from some moment on; huge pages; guests that check free pages."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from qemu.qmp import QMPClient

from hva_host.agent import hazards
from hva_host.agent.fleet import Fleet
from hva_host.agent.model import VmState
from hva_host.agent.vm import Vm
from hvaqemu.config import VmConfig
from hvaqemu.errors import HvaError, RefusedError
from hvaqemu.paths import runtime_dir
from hvaqemu.qemu import user_args
from hvaqemu.units import MiB
from tests.vm.harness import (
    BOOT_SECONDS,
    BOTH,
    STEP_SECONDS,
    Guest,
    nothing_left,
    until,
)

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(600)]

_MEMORY = 256 * MiB
_NAME = "environment"
_BACK_END = ("-chardev", "socket,id=fs,path={socket}")


class Visited(Guest):
    """A guest whose QEMU has a second monitor; its VM outlives its host agent."""

    other: QMPClient
    folder: Path

    async def plug(self, command: str, **arguments: object) -> Any:
        """A command by somebody who does not ask hvaqemu."""
        return await self.other.execute(command, {key.replace("_", "-"): value for key, value in arguments.items()})

    def said(self) -> list[tuple[str, str]]:
        """Word of reclaim being refused and allowed again, in order."""
        return [(name, data["reason"]) for name, data in self.events if name.startswith("RECLAIM_")]


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def guest() -> AsyncIterator[Visited]:
    folder = Path(tempfile.mkdtemp(prefix="hve-", dir="/tmp"))
    events: list[tuple[str, dict[str, Any]]] = []
    fleet = Fleet(runtime_dir(), on_event=lambda event, data: events.append((event, data)))
    monitor = folder / "other.sock"
    config = VmConfig(
        name=_NAME,
        memory=_MEMORY,
        allow_exec=True,
        boot_timeout=BOOT_SECONDS,
        qemu_args=("-qmp", f"unix:{monitor},server=on,wait=off"),
    )
    found: Visited | None = None
    try:
        found = Visited(fleet, await fleet.up(config, print), events)
        found.folder, found.other = folder, QMPClient("other")
        await found.other.connect(str(monitor))
        yield found
        await found.other.disconnect()
    finally:
        owner = found.fleet if found is not None else fleet
        for vm in owner.vms():
            await owner.down(vm.name)
        await owner.close()
        shutil.rmtree(folder)
    await nothing_left(_NAME)


@asynccontextmanager
async def refused(guest: Visited, reason: str) -> AsyncIterator[None]:
    """What is done inside makes reclaim be refused, loudly, and undone inside :func:`allowed` it goes on by itself."""
    before = len(guest.said())
    guest.vm.start_reclaiming(BOTH, 0.0)
    seen = guest.heard("EPOCH")
    await until(lambda: guest.heard("EPOCH") > seen, STEP_SECONDS, "an epoch")
    yield
    await until(lambda: guest.said()[before:], STEP_SECONDS, "word that reclaim is refused")
    name, why = guest.said()[before]
    assert name == "RECLAIM_REFUSED"
    assert reason in why
    await until_refused(guest.vm, reason)
    seen = guest.heard("EPOCH")
    assert await guest.run("echo alive") == "alive\n"
    # Nothing tells of what does not happen.
    await asyncio.sleep(1.0)
    assert guest.heard("EPOCH") == seen, "epochs go on"


async def until_refused(vm: Vm, reason: str) -> None:
    """Every place where a user may look says so."""
    status = await vm.status()
    assert reason in status.reclaim_refused
    assert status.state is VmState.RUNNING
    with pytest.raises(RefusedError, match=f"VM {_NAME}: nothing is discarded: "):
        await vm.reclaim(BOTH, epochs=1)


async def allowed(guest: Visited) -> None:
    """What was in the way is gone: the reclaim that was begun before goes on by itself."""
    await until(lambda: guest.said()[-1] == ("RECLAIM_ALLOWED", ""), STEP_SECONDS, "word that reclaim is allowed again")
    seen = guest.heard("EPOCH")
    await until(lambda: guest.heard("EPOCH") > seen + 1, STEP_SECONDS, "epochs")
    assert (await guest.vm.stop_reclaiming()).epochs
    assert (await guest.vm.status()).reclaim_refused == ""


async def test_memory_plugged_in_later_stops_reclaim(guest: Visited) -> None:
    async with refused(guest, "second memory back end (mem1)"):
        await guest.plug("object-add", qom_type="memory-backend-ram", id="mem1", size=1 << 20)
    await guest.plug("object-del", id="mem1")
    await allowed(guest)


async def test_a_disk_opened_later_for_direct_io_stops_reclaim(guest: Visited) -> None:
    path = guest.vm.folder.disks / "direct.raw"
    path.write_bytes(bytes(1 << 20))
    async with refused(guest, "disk late (file) is open for direct I/O"):
        await guest.plug("blockdev-add", driver="file", node_name="late", filename=str(path), cache={"direct": True})
    await guest.plug("blockdev-del", node_name="late")
    await allowed(guest)


async def test_a_process_that_maps_ram_stops_reclaim(guest: Visited) -> None:
    """virtiofs, with a back end that maps the guest's RAM once the guest's driver starts the device."""
    path = guest.folder / "virtiofs.sock"
    with back_end(path) as process:
        async with refused(guest, "vhost-user-fs-ccw: another process writes guest RAM"):
            address = {"type": "unix", "data": {"path": str(path)}}
            backend = {"type": "socket", "data": {"addr": address, "server": False}}
            await guest.plug("chardev-add", id="fs", backend=backend)
            await guest.plug("device_add", driver="vhost-user-fs-ccw", chardev="fs", tag="x", id="fs0")
        assert hazards.of_process(guest.qemu_pid) == ""
        await guest.run("modprobe virtiofs")
        assert process.stdout is not None
        assert await asyncio.to_thread(process.stdout.readline) == b"mapped\n"
        assert f"(process {process.pid})" in hazards.of_process(guest.qemu_pid)
        await until(lambda: "mapped by other processes too" in guest.vm.refusals.text, STEP_SECONDS, "word of it")
        await guest.plug("device_del", id="fs0")
        await until(lambda: "vhost-user" not in guest.vm.refusals.text, STEP_SECONDS, "the device's end")
        assert "mapped by other processes too" in (await guest.vm.status()).reclaim_refused, "it still has the RAM"
    await allowed(guest)


@contextmanager
def back_end(path: Path) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("vhost_user.py")), str(path)], stdout=subprocess.PIPE
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"listening\n"
            yield process
        finally:
            process.kill()


async def test_a_hazard_that_came_while_no_host_agent_ran_is_found_at_adoption(guest: Visited) -> None:
    await guest.vm.reclaim(BOTH, epochs=1)
    await guest.fleet.close()
    await guest.plug("object-add", qom_type="memory-backend-ram", id="mem1", size=1 << 20)
    guest.events.clear()
    guest.fleet = Fleet(runtime_dir(), on_event=lambda event, data: guest.events.append((event, data)))
    await guest.fleet.start()
    guest.vm = guest.fleet.get(_NAME)
    await until(guest.said, STEP_SECONDS, "word that reclaim is refused")
    await until_refused(guest.vm, "second memory back end (mem1)")
    async with asyncio.timeout(STEP_SECONDS):
        await guest.vm.guest.wait_connected(STEP_SECONDS)
    # Refaults are answered all the same.
    await guest.tree_digest()
    await guest.plug("object-del", id="mem1")
    await until(lambda: guest.said()[-1] == ("RECLAIM_ALLOWED", ""), STEP_SECONDS, "word that reclaim is allowed again")
    assert (await guest.epoch()).discarded > 0


async def test_a_balloon_that_reports_free_pages_stops_reclaim(guest: Visited) -> None:
    """Without an id it sits elsewhere in the tree than the one that hvaqemu gives.

    The last thing done to this guest: its driver for this device does not get along with QEMU's, nor lets go of it.
    """
    await guest.plug("device_del", id="balloon0")
    async with refused(guest, "free page reporting is on"):
        await guest.plug("device_add", driver="virtio-balloon-ccw", free_page_reporting=True)
    await guest.vm.reclaimer.cancel()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["-object", "memory-backend-ram,id=mem1,size=1M"], "second memory back end (mem1)"),
        (
            ["-object", f"memory-backend-ram,id=mem1,size={_MEMORY}", "-machine", "memory-backend=mem1"],
            "second memory back end (mem1)",
        ),
        (["-blockdev", "driver=file,node-name=direct,filename={file},cache.direct=on"], "direct I/O"),
        (["-global", "virtio-balloon-device.free-page-reporting=on"], "free page reporting"),
        (["-device", "vhost-user-fs-ccw,chardev=fs,tag=x", *_BACK_END], "another process"),
        (["-netdev", "vhost-user,id=n,chardev=fs", *_BACK_END], "another process"),
    ],
    ids=["object", "machine", "disk", "balloon", "virtiofs", "net"],
)
async def test_at_launch_it_is_refused_and_nothing_is_left(
    arguments: list[str], reason: str, places: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Past the check of the arguments, which tells the same before anything starts: the QEMU that runs is asked."""
    folder = Path(tempfile.mkdtemp(prefix="hve-", dir="/tmp"))
    disk = places / "direct.raw"
    disk.write_bytes(bytes(1 << 20))
    given = tuple(word.format(file=disk, socket=folder / "s") for word in arguments)
    with pytest.raises(ValueError, match="qemu_args"):
        VmConfig(name="unsafe", memory=_MEMORY, qemu_args=given)
    monkeypatch.setattr(user_args, "check", lambda _arguments: ())
    config = VmConfig(name="unsafe", memory=_MEMORY, qemu_args=given)
    fleet = Fleet(runtime_dir(), embedded=True)
    try:
        with back_end(folder / "s"), pytest.raises(HvaError) as caught:
            await fleet.up(config, print)
        assert isinstance(caught.value, RefusedError), caught.value
        assert reason in caught.value.message
        assert "VM unsafe: " in caught.value.message
        assert fleet.vms() == []
        await nothing_left("unsafe")
    finally:
        await fleet.close()
        shutil.rmtree(folder)
        disk.unlink()
