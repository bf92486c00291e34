"""What others do to a QEMU while epochs run one after the other: stop, reset, snapshots, full reads, migration.

The guest churns and verifies itself all the while. Nothing of it may come out wrong, and reclaim goes on afterwards.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import struct
import subprocess
import tempfile
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from qemu.qmp import QMPClient

from hva_host.agent.model import ReclaimResult, VmState
from hvaqemu.errors import HvaError, RefusedError
from hvaqemu.units import MiB
from tests.vm.harness import BOOT_SECONDS, BOTH, GUEST_PROGRAMS, STEP_SECONDS, VOLATILE, Guest, running_guest, until

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(600)]

_MEMORY = 256 * MiB
_SOME_EPOCHS = 3
_CHURN = "cd /run; setsid sh -c 'python3 -B churn.py {seconds} >churn.said 2>&1; echo $? >churn.status' &"

#: Holds memory whose checksum it says at first, and again when asked.
_HELD = """
import hashlib, os, time
data = os.urandom(24 << 20)
def say(name):
    with open(name + ".new", "w") as file:
        file.write(hashlib.md5(data).hexdigest())
    os.rename(name + ".new", name)
say("held")
while not os.path.exists("ask"):
    time.sleep(0.2)
say("answer")
"""


class Foreign(Guest):
    """A guest whose QEMU has a second monitor, for whoever has nothing to do with hvaqemu."""

    other: QMPClient
    folder: Path
    #: The checksum of many files, before anything was done.
    tree: str

    async def tell(self, command: str, **arguments: object) -> Any:
        """A command through hvaqemu, as an operator gives it."""
        return await self.vm.monitor(command, {key.replace("_", "-"): value for key, value in arguments.items()}, 60.0)

    async def epochs(self, count: int = _SOME_EPOCHS) -> None:
        """Wait until so many more epochs have ended."""
        seen = self.heard("EPOCH")
        await until(lambda: self.heard("EPOCH") >= seen + count, STEP_SECONDS, f"{count} epochs")

    async def job(self, name: str) -> None:
        """Wait for a job of QEMU's, and see that it did well."""
        async with asyncio.timeout(STEP_SECONDS):
            while True:
                (job,) = [job for job in await self.tell("query-jobs") if job["id"] == name]
                if job["status"] == "concluded":
                    break
                await asyncio.sleep(0.05)
        assert "error" not in job, job
        await self.tell("job-dismiss", id=name)

    def reasons(self) -> list[str]:
        """What reclaim was refused for, in order."""
        return [data["reason"] for name, data in self.events if name == "RECLAIM_REFUSED"]

    async def churn(self, seconds: int) -> None:
        """Have the guest churn in the background: this waits for nothing."""
        await self.run(f"rm -f /run/churn.status; {_CHURN.format(seconds=seconds)}")

    async def churned(self) -> None:
        """Wait for the churn's end; everything it looked at must have been right."""
        async with asyncio.timeout(STEP_SECONDS):
            while True:
                try:
                    if (await self.run("cat /run/churn.status 2>/dev/null || true")).strip():
                        break
                except HvaError:
                    # The guest agent may be greeting us, having found itself in another time.
                    pass
                await asyncio.sleep(0.2)
        said = await self.run("cat /run/churn.said /run/churn.status")
        assert "mismatch" not in said, said
        assert said.split()[-1] == "0", said


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def guest() -> AsyncIterator[Foreign]:
    folder = Path(tempfile.mkdtemp(prefix="hvf-", dir="/tmp"))
    monitor = folder / "other.sock"
    second = ("-qmp", f"unix:{monitor},server=on,wait=off")
    other = QMPClient("other")
    try:
        async with running_guest("foreign", memory=_MEMORY, qemu_args=second) as plain:
            found = Foreign(plain.fleet, plain.vm, plain.events)
            found.folder, found.other = folder, other
            await other.connect(str(monitor))
            await remember(found)
            found.tree = await found.tree_digest()
            try:
                yield found
            finally:
                await other.disconnect()
    finally:
        shutil.rmtree(folder)


async def remember(guest: Foreign) -> None:
    """Put the churn into the guest, and have it take the checksums it will compare with."""
    program = (GUEST_PROGRAMS / "churn.py").read_bytes()
    assert (await guest.vm.execute(["tee", "/run/churn.py"], timeout=STEP_SECONDS, stdin=program)).ok
    await guest.run("python3 -B /run/churn.py remember")


@asynccontextmanager
async def continuous_epochs(guest: Foreign, seconds: int) -> AsyncIterator[list[ReclaimResult]]:
    """Epochs without a pause under a guest that churns for ``seconds``; afterwards all of it must be right."""
    results: list[ReclaimResult] = []
    await guest.churn(seconds)
    guest.vm.start_reclaiming(BOTH, 0.0)
    try:
        await guest.epochs()
        yield results
        await guest.churned()
    finally:
        results.append(await guest.vm.stop_reclaiming())
    assert results[0].discarded > 0
    assert await guest.complaints() == []
    assert await guest.tree_digest() == guest.tree
    assert (await guest.vm.status()).reclaim_refused == ""


async def test_stop_and_cont(guest: Foreign) -> None:
    async with continuous_epochs(guest, 8):
        for _ in range(2):
            await guest.tell("stop")
            assert (await guest.vm.status()).state is VmState.PAUSED
            # Copies need no guest, which is not waited for; what it would have to confirm stays.
            await guest.epochs(2)
            stats = guest.vm.reclaimer.epochs[-1]
            assert (stats.note, stats.unconfirmed) == ("", 0)
            await guest.tell("cont")
            assert (await guest.vm.status()).state is VmState.RUNNING
            await asyncio.sleep(0.5)


async def test_ballooning_by_another_tool(guest: Foreign) -> None:
    async with continuous_epochs(guest, 12):
        for size in (160 * MiB, _MEMORY, 176 * MiB, _MEMORY):
            await guest.other.execute("balloon", {"value": size})
            await balloon_is(guest.other, size)
            await guest.epochs(2)
    assert int((await guest.run("grep MemTotal /proc/meminfo")).split()[1]) > 200 * 1024


async def balloon_is(client: QMPClient, size: int) -> None:
    """Wait until the guest has so many bytes; QEMU's events of it go to the other monitor too, and are rate-limited."""
    async with asyncio.timeout(STEP_SECONDS):
        while True:
            answer: Mapping[str, Any] = await client.execute("query-balloon")  # type: ignore[assignment]
            if answer["actual"] == size:
                return
            await asyncio.sleep(0.1)


async def test_snapshot_save_and_load(guest: Foreign) -> None:
    """Back to a moment at which the guest was idle.

    Of a busy one QEMU loses interrupts: what waits in TCG's interrupt controller is in no snapshot (QEMU 7.2,
    hw/intc/s390_flic.c has it in no vmstate), and a guest without its virtio interrupts hangs, epochs or not (seen).
    """
    disk = {"vmstate": "root", "devices": ["root"]}
    before = len(guest.reasons())
    assert (await guest.vm.execute(["tee", "/run/held.py"], timeout=STEP_SECONDS, stdin=_HELD.encode())).ok
    held = await guest.run("cd /run; setsid python3 -B held.py & while [ ! -s held ]; do sleep 0.1; done; cat held")
    await guest.vm.reclaim(BOTH)
    await asyncio.sleep(1.0)
    await guest.tell("snapshot-save", job_id="save", tag="then", **disk)
    await guest.job("save")
    async with continuous_epochs(guest, 5):
        await guest.run("echo after >/run/when")
    guest.vm.start_reclaiming(BOTH, 0.0)
    await guest.epochs()
    await guest.tell("snapshot-load", job_id="load", tag="then", **disk)
    await guest.job("load")
    await guest.vm.guest.ping(STEP_SECONDS)
    await guest.epochs()
    assert await guest.run("cat /run/when 2>/dev/null || echo before") == "before\n"
    await guest.run("touch /run/ask; while [ ! -s /run/answer ]; do sleep 0.1; done")
    assert await guest.run("cat /run/answer") == held
    assert (await guest.vm.stop_reclaiming()).discarded > 0
    async with continuous_epochs(guest, 3):
        pass
    said = guest.reasons()[before:]
    assert any("snapshot-save" in reason for reason in said)
    assert any("snapshot-load" in reason for reason in said)
    await guest.tell("snapshot-delete", job_id="delete", tag="then", devices=["root"])
    await guest.job("delete")


async def test_full_reads_of_ram_see_what_the_guest_has(guest: Foreign) -> None:
    """The guest stands still, so its RAM is what it was before anything of it was discarded."""
    await guest.tree_digest()
    await guest.tell("stop")
    try:
        await guest.vm.restore()
        whole = await saved(guest)
        stats = await guest.epoch(VOLATILE)
        assert stats.discarded_layer > 1000
        absent = int((~guest.presence()).sum())
        refaults = (await guest.vm.measure()).refault_pages
        dumped = guest.folder / "dump"
        await guest.tell("dump-guest-memory", paging=False, protocol=f"file:{dumped}")
        assert (await guest.vm.measure()).refault_pages - refaults > 1000
        assert memory_of_dump(dumped) == whole
        dumped.unlink()
        stats = await guest.epoch(VOLATILE)
        assert stats.discarded_layer > 1000
        assert int((~guest.presence()).sum()) >= absent
        assert await saved(guest) == whole
    finally:
        await guest.tell("cont")
    async with continuous_epochs(guest, 4):
        for _ in range(3):
            await saved(guest)


async def saved(guest: Foreign) -> str:
    """A checksum of all of RAM, as ``pmemsave`` reads it."""
    path = guest.folder / "ram"
    await guest.tell("pmemsave", val=0, size=_MEMORY, filename=str(path))
    return checksum(path)


def checksum(path: Path) -> str:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    path.unlink()
    return found


def memory_of_dump(path: Path) -> str:
    """A checksum of the memory in an ELF core of a big-endian guest (elf(5): e_phoff, e_phnum; p_type, p_offset, …)."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        header = file.read(64)
        assert header[:6] == b"\x7fELF\x02\x02"
        (offset,), (count,) = struct.unpack_from(">Q", header, 32), struct.unpack_from(">H", header, 56)
        end = 0
        for number in range(count):
            file.seek(offset + 56 * number)
            kind, _, at, _, address, size = struct.unpack(">IIQQQQ", file.read(40))
            if kind == 1:
                assert address == end, "all of RAM, in order"
                end = address + size
                file.seek(at)
                digest.update(file.read(size))
    assert end == _MEMORY
    return digest.hexdigest()


async def test_a_migration_through_us(guest: Foreign) -> None:
    """To a file, which another QEMU then reads: what arrives is what the guest has. The guest goes on here."""
    stream = guest.folder / "stream"
    await guest.tell("migrate-set-parameters", downtime_limit=30_000, max_bandwidth=200 << 20)
    async with continuous_epochs(guest, 8):
        received = asyncio.create_task(receive(guest.folder / "migrate.sock", stream))
        await until((guest.folder / "migrate.sock").exists, 5, "a listener")
        await guest.tell("migrate", uri=f"unix:{guest.folder / 'migrate.sock'}")
        await received
        async with asyncio.timeout(STEP_SECONDS):
            while (status := (await guest.tell("query-migrate"))["status"]) != "completed":
                assert status in ("setup", "active", "device"), status
                await asyncio.sleep(0.05)
        assert any("migrat" in reason for reason in guest.reasons())
        here = await saved(guest)
        there = await arrived(guest, stream)
        assert here == there
        await guest.tell("cont")


async def receive(path: Path, into: Path) -> None:
    """Write what one connection to a socket brings to a file."""
    done = asyncio.Event()

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with into.open("wb") as file:
            while data := await reader.read(1 << 20):
                file.write(data)
        writer.close()
        done.set()

    async with await asyncio.start_unix_server(copy, path), asyncio.timeout(STEP_SECONDS):
        await done.wait()
    path.unlink(missing_ok=True)


async def arrived(guest: Foreign, stream: Path) -> str:
    """A checksum of the RAM of a QEMU without us that took in a migration."""
    monitor = guest.folder / "there.sock"
    words = Path(f"/proc/{guest.qemu_pid}/cmdline").read_bytes().decode().split("\0")[:-1]
    argv = words[: words.index("-sandbox")]
    for at, word in enumerate(argv):
        if word.startswith("socket,id=qmp,"):
            argv[at] = f"socket,id=qmp,path={monitor},server=on,wait=off"
        elif word.startswith(("socket,id=agent,", "file,id=console,")):
            argv[at] = f"null,id={word.split(',')[1].removeprefix('id=')}"
    with subprocess.Popen([*argv, "-incoming", f"exec:cat {stream}"]) as qemu:  # noqa: ASYNC220
        client = QMPClient("there")
        try:
            await until(monitor.exists, STEP_SECONDS, "the other QEMU")
            await client.connect(str(monitor))
            async with asyncio.timeout(STEP_SECONDS):
                status = await after_arrival(client)
            assert status in ("paused", "prelaunch", "postmigrate"), status
            path = guest.folder / "there"
            await client.execute("pmemsave", {"val": 0, "size": _MEMORY, "filename": str(path)})
            return checksum(path)
        finally:
            qemu.kill()
            if client.runstate.name != "IDLE":
                with suppress(EOFError, OSError):
                    await client.disconnect()
            monitor.unlink(missing_ok=True)


async def after_arrival(client: QMPClient) -> str:
    """The state of a QEMU once its guest has arrived."""
    while True:
        answer: Mapping[str, Any] = await client.execute("query-status")  # type: ignore[assignment]
        if answer["status"] != "inmigrate":
            return str(answer["status"])
        await asyncio.sleep(0.05)


async def test_a_migration_that_somebody_else_begins(guest: Foreign) -> None:
    async with continuous_epochs(guest, 8):
        before = len(guest.reasons())
        received = asyncio.create_task(receive(guest.folder / "migrate.sock", guest.folder / "stream"))
        await until((guest.folder / "migrate.sock").exists, 5, "a listener")
        await guest.other.execute("migrate-set-parameters", {"max-bandwidth": 1 << 20})
        await guest.other.execute("migrate", {"uri": f"unix:{guest.folder / 'migrate.sock'}"})
        await until(lambda: len(guest.reasons()) > before, 5, "word of the migration")
        assert "a migration is under way" in guest.reasons()[-1]
        assert "migration" in (await guest.vm.status()).reclaim_refused
        with pytest.raises(RefusedError, match="a migration is under way"):
            await guest.vm.reclaimer._check()
        seen = guest.heard("EPOCH")
        await asyncio.sleep(1.0)
        assert guest.heard("EPOCH") <= seen + 1, "the one that was under way"
        await guest.other.execute("migrate_cancel")
        await received
        await until(lambda: guest.vm.refusals.text == "", 10, "the migration's end")
        assert [name for name, _ in guest.events if name.startswith("RECLAIM_")][-1] == "RECLAIM_ALLOWED"


async def test_system_reset(guest: Foreign) -> None:
    boot = await guest.run("cat /proc/sys/kernel/random/boot_id")
    await guest.churn(60)
    guest.vm.start_reclaiming(BOTH, 0.0)
    await guest.epochs()
    resets = guest.heard("VM_RESET")
    await guest.tell("system_reset")
    await until(lambda: guest.heard("VM_RESET") > resets, 5, "a reset")
    async with asyncio.timeout(BOOT_SECONDS):
        while True:
            try:
                await guest.vm.guest.wait_connected(BOOT_SECONDS)
                if await guest.run("cat /proc/sys/kernel/random/boot_id") != boot:
                    break
            except HvaError:
                await asyncio.sleep(0.1)
    await guest.epochs()
    assert (await guest.vm.stop_reclaiming()).discarded > 0
    await remember(guest)
    async with continuous_epochs(guest, 4):
        pass


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to limit a control group")
async def test_restore_and_full_reads_respect_a_memory_limit(guest: Foreign) -> None:
    group = Path(f"/sys/fs/cgroup/memory/hva-test-{os.getpid()}")
    home = next(
        line.split(":", 2)[2]
        for line in Path(f"/proc/{guest.qemu_pid}/cgroup").read_text().splitlines()
        if ":memory:" in line or line.startswith("0:")
    )
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no control group can be made here: {error}")
    try:
        await guest.tree_digest()
        await guest.vm.reclaim(BOTH)
        discarded, _ = await guest.vm._room_needed()
        assert discarded > 64 * MiB
        (group / "cgroup.procs").write_text(str(guest.qemu_pid))
        (group / "memory.limit_in_bytes").write_text(str(32 * MiB))
        with pytest.raises(RefusedError, match="available"):
            await guest.vm.restore()
        with pytest.raises(RefusedError, match=r"the host has .* available"):
            await guest.tell("migrate", uri="unix:/nowhere")
        (group / "memory.limit_in_bytes").write_text("-1")
        assert await guest.vm.restore() >= discarded // 4096 // 2
    finally:
        (group / "memory.limit_in_bytes").write_text("-1")
        (Path("/sys/fs/cgroup/memory") / home.lstrip("/") / "cgroup.procs").write_text(str(guest.qemu_pid))
        group.rmdir()
