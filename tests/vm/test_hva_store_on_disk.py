"""A store that is a file, on a real guest: it outlives pager and host agent, not QEMU; a full disk loses nothing."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from hva_host.agent.model import ReclaimResult, VmStatus
from hvaqemu.units import MiB
from tests.kernel.harness import evict
from tests.vm.harness import STEP_SECONDS, TREE, until
from tests.vm.host import Host, own_host
from tests.vm.programs import bundle, start_command

pytestmark = pytest.mark.timeout(900)

_NAME = "stored"
_STATES = ("unused", "volatile", "stable")
_KEPT = 24 * MiB
#: Less than there is to page out, and more than the program's memory takes.
_LIMIT = 12 * MiB


@pytest.fixture
def host() -> Iterator[Host]:
    with own_host() as made:
        yield made


class Stored:
    """A VM whose store is in a folder, with a program that keeps memory and can check it."""

    def __init__(self, host: Host, folder: Path) -> None:
        self.host = host
        self.folder = folder

    async def up(self) -> None:
        file = self.host.folder / "vm.yaml"
        file.write_text(
            f"name: {_NAME}\nmemory: 256M\ncpus: 2\nallow_exec: true\nboot_timeout: 240s\n"
            f"store: {{folder: {self.folder}, limit: {_LIMIT}}}\n"
        )
        await self.host.command("up", file)
        await self.run("keep", str(_KEPT))

    async def run(self, *arguments: str) -> None:
        """Have the program do something that must succeed."""
        async with self.host.client() as client:
            done = await client.run(_NAME, start_command("keeper", *arguments), STEP_SECONDS, bundle())
        assert done.ok, done

    async def tree(self) -> str:
        async with self.host.client() as client:
            return (await client.run(_NAME, ("sh", "-c", TREE), STEP_SECONDS, b"")).stdout.decode()

    async def reclaim(self) -> ReclaimResult:
        async with self.host.client() as client:
            return await client.reclaim(_NAME, _STATES, None, lambda _stats: None)

    async def status(self) -> VmStatus:
        return VmStatus.model_validate_json(await self.host.command("status", _NAME, "--json"))

    async def file(self) -> Path:
        """The store, as its pager has it open."""
        number = (await self.host.pager_status(_NAME))["store_file"]
        (pager,) = self.host.pagers()
        return Path(f"/proc/{pager}/fd/{number}")

    def evict(self, file: Path) -> None:
        with file.open("r+b") as opened:
            evict(opened.fileno())


def holders(device: int, inode: int) -> list[str]:
    """Descriptors of whatever process that keep a file."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            status = entry.stat()
        except OSError:
            continue
        if (status.st_dev, status.st_ino) == (device, inode):
            found.append(str(entry))
    return found


async def test_it_outlives_pager_and_host_agent_and_ends_with_qemu(host: Host) -> None:
    folder = host.folder / "pages"
    folder.mkdir()
    vm = Stored(host, folder)
    await vm.up()
    tree = await vm.tree()
    result = await vm.reclaim()
    # A full store stops paging out, and nothing else.
    assert {stats.note for stats in result.epochs} == {"", "the store has reached its limit"}
    measure = (await vm.status()).measure
    assert measure is not None
    assert _LIMIT / 2 < measure.store_bytes <= _LIMIT + MiB
    assert measure.preserved_pages > 2000
    assert list(folder.iterdir()) == [], "it has a name"
    file = await vm.file()
    status = file.stat()
    assert (status.st_mode & 0o7777, status.st_nlink) == (0o600, 0)
    assert status.st_dev == folder.stat().st_dev

    vm.evict(file)
    measure = (await vm.status()).measure
    assert measure is not None
    assert measure.store_cached_bytes is not None
    assert measure.store_cached_bytes < measure.store_bytes / 4
    assert "on disk" in await host.command("status", _NAME)
    # Neither is there while the guest reads what is on the disk.
    (pager,), (agent,) = host.pagers(), host.agents()
    assert host.send(pager, signal.SIGKILL)
    assert host.send(agent, signal.SIGKILL)
    await until(lambda: not {pager, agent}.intersection(host.processes()), STEP_SECONDS, "deaths")
    await host.connected(_NAME)
    await vm.run("check")
    assert await vm.tree() == tree

    await vm.reclaim()
    vm.evict(await vm.file())
    (pager,) = host.pagers()
    assert host.send(pager, signal.SIGKILL)
    await vm.run("check")
    await host.command("restore", _NAME)
    await vm.reclaim()
    await host.command("down", _NAME)
    await until(lambda: not holders(status.st_dev, status.st_ino), STEP_SECONDS, "the end of the file")
    assert list(folder.iterdir()) == []
    await host.all_gone()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 48 MiB."""
    if os.geteuid() != 0:
        pytest.skip("only root mounts a small file system")
    image, folder = tmp_path / "small.img", tmp_path / "small"
    folder.mkdir()
    with image.open("wb") as file:
        file.truncate(48 * MiB)
    subprocess.run(["mke2fs", "-q", "-F", "-t", "ext4", image], check=True)
    subprocess.run(["mount", "-o", "loop", image, folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


async def test_a_full_disk_stops_paging_out_and_not_the_guest(host: Host, small_disk: Path) -> None:
    vm = Stored(host, small_disk)
    await vm.up()
    tree = await vm.tree()
    room = os.statvfs(small_disk)
    # Somebody else takes the room that there was when the VM started, all but a MiB or two.
    with (small_disk / "other").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, room.f_bavail * room.f_frsize - 2 * MiB)
    result = await vm.reclaim()
    notes = {stats.note for stats in result.epochs}
    assert "the store can not be written: No space left on device" in notes
    assert sum(stats.discarded_layer for stats in result.epochs) > 1000
    assert sum(stats.discarded_store for stats in result.epochs) > 0
    await vm.run("check")
    assert await vm.tree() == tree
    # There is room again.
    (small_disk / "other").unlink()
    result = await vm.reclaim()
    assert sum(stats.discarded_store for stats in result.epochs) > 1000
    vm.evict(await vm.file())
    await vm.run("check")

    await vm.reclaim()
    status = (await vm.file()).stat()
    qemu = host.qemu()
    assert qemu is not None
    assert host.send(qemu, signal.SIGKILL)
    await until(lambda: not holders(status.st_dev, status.st_ino), STEP_SECONDS, "the end of the file")
    assert {path.name for path in small_disk.iterdir()} <= {"lost+found"}
    await host.command("down", _NAME)
    await host.all_gone()
