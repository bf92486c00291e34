"""What others do to a QEMU while epochs run one after the other: stop, reset, snapshots, full reads, migration.

The guest churns and verifies itself all the while. Nothing of it may come out wrong, and reclaim goes on afterwards.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from hva_host.agent.model import VmState
from hvaqemu.errors import RefusedError
from hvaqemu.units import MiB
from tests.vm.foreign import (
    MEMORY,
    Foreign,
    arrived,
    balloon_is,
    continuous_epochs,
    memory_of_dump,
    receive,
    remember,
    running_foreign,
    saved,
)
from tests.vm.harness import BOTH, STEP_SECONDS, VOLATILE, until

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(600)]


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


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def guest() -> AsyncIterator[Foreign]:
    async with running_foreign() as found:
        yield found


async def test_stop_and_cont(guest: Foreign) -> None:
    async with continuous_epochs(guest):
        for _ in range(2):
            await guest.tell("stop")
            assert (await guest.vm.status()).state is VmState.PAUSED
            # Copies need no guest, which is not waited for; what it would have to confirm stays.
            await guest.epochs(2)
            stats = guest.vm.reclaimer.epochs[-1]
            assert (stats.note, stats.unconfirmed) == ("", 0)
            await guest.tell("cont")
            assert (await guest.vm.status()).state is VmState.RUNNING
            # The guest works in between.
            await asyncio.sleep(0.5)


async def test_ballooning_by_another_tool(guest: Foreign) -> None:
    async with continuous_epochs(guest):
        for size in (160 * MiB, MEMORY, 176 * MiB, MEMORY):
            await guest.other.execute("balloon", {"value": size})
            await balloon_is(guest.other, size)
            await guest.epochs(2)
    assert int((await guest.run("grep MemTotal /proc/meminfo")).split()[1]) > 200 * 1024


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
    # Idle, it waits for no interrupt that could be lost. It is told what was discarded, up to 5 s after the last epoch.
    await guest.run("sync")
    await asyncio.sleep(6.0)
    await guest.tell("snapshot-save", job_id="save", tag="then", **disk)
    await guest.job("save")
    async with continuous_epochs(guest):
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
    async with continuous_epochs(guest):
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
    async with continuous_epochs(guest):
        for _ in range(3):
            await saved(guest)


async def test_a_migration_through_us(guest: Foreign) -> None:
    """To a file, which another QEMU then reads: what arrives is what the guest has. The guest goes on here."""
    stream = guest.folder / "stream"
    await guest.tell("migrate-set-parameters", downtime_limit=30_000, max_bandwidth=200 << 20)
    async with continuous_epochs(guest):
        received = asyncio.create_task(receive(guest.folder / "migrate.sock", stream))
        await until((guest.folder / "migrate.sock").exists, STEP_SECONDS, "a listener")
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


async def test_a_migration_that_somebody_else_begins(guest: Foreign) -> None:
    async with continuous_epochs(guest):
        before = len(guest.reasons())
        received = asyncio.create_task(receive(guest.folder / "migrate.sock", guest.folder / "stream"))
        await until((guest.folder / "migrate.sock").exists, STEP_SECONDS, "a listener")
        await guest.other.execute("migrate-set-parameters", {"max-bandwidth": 1 << 20})
        await guest.other.execute("migrate", {"uri": f"unix:{guest.folder / 'migrate.sock'}"})
        await until(lambda: len(guest.reasons()) > before, STEP_SECONDS, "word of the migration")
        assert "a migration is under way" in guest.reasons()[-1]
        assert "migration" in (await guest.vm.status()).reclaim_refused
        with pytest.raises(RefusedError, match="a migration is under way"):
            await guest.vm.reclaimer._check()
        seen = guest.heard("EPOCH")
        # Nothing tells of what does not happen.
        await asyncio.sleep(1.0)
        assert guest.heard("EPOCH") <= seen + 1, "the one that was under way"
        await guest.other.execute("migrate_cancel")
        await received
        await until(lambda: guest.vm.refusals.text == "", STEP_SECONDS, "the migration's end")
        assert [name for name, _ in guest.events if name.startswith("RECLAIM_")][-1] == "RECLAIM_ALLOWED"


async def test_system_reset(guest: Foreign) -> None:
    boot = await guest.boot_id()
    await guest.churn()
    guest.vm.start_reclaiming(BOTH, 0.0)
    await guest.epochs()
    resets = guest.heard("VM_RESET")
    await guest.tell("system_reset")
    await until(lambda: guest.heard("VM_RESET") > resets, STEP_SECONDS, "a reset")
    await guest.rebooted(boot)
    await guest.epochs()
    assert (await guest.vm.stop_reclaiming()).discarded > 0
    await remember(guest)
    async with continuous_epochs(guest):
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
