"""What a guest wrote becomes a layer while it goes on writing; whoever dies meanwhile, no byte of it is lost.

One guest, with ext4 on its root disk and xfs on a second disk of its own (the one it might swap to). That disk goes
with the guest; so what xfs has synced when QEMU is killed is looked for in another one, in a file on the root disk.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import pytest_asyncio

from hvaqemu.config import FreezeConfig
from hvaqemu.errors import HvaError, RefusedError
from hvaqemu.units import MiB
from tests.vm.frozen import DISKS, FOLDER, Frozen, running
from tests.vm.harness import COMPLAINTS
from tests.vm.host import Host, own_host

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(900)]

_NAME = "frozen"
_XFS_BYTES = 64 * MiB
_EXT4, _XFS = FOLDER, "/mnt/frozen"
_FOLDERS = (_EXT4, _XFS)
_KEPT_IMAGE, _KEPT_XFS = "/var/tmp/xfs.raw", "/mnt/kept"
_KEPT = (_EXT4, _KEPT_XFS)
#: The first xfs is the same to its number.
_MOUNT_KEPT = f"modprobe loop; mkdir -p {_KEPT_XFS}; mount -t xfs -o loop,nouuid {_KEPT_IMAGE} {_KEPT_XFS}"
_SECONDS = 10
#: How often the guest rewrites its files for so long at most.
_ROUNDS = 6
_DEPTH = FreezeConfig().depth
_WRITTEN = 24 * MiB

FREEZE = [
    "agent.freeze.made",
    "agent.freeze.recorded",
    "agent.freeze.opened",
    "agent.freeze.pivoted",
    "agent.freeze.believed",
    "agent.freeze.closed",
    "agent.layer.indexed",
    "agent.layer.listed",
    "agent.layer.added",
]
MERGE = [
    "agent.merge.recorded",
    "pager.layer.withdrawn",
    "pager.layer.freed",
    "agent.layer.dropped",
    "agent.merge.withdrawn",
    "agent.merge.begun",
    "agent.merge.committed",
    "agent.merge.retired",
    "agent.merge.dropped",
]


class Disks(Frozen):
    """The guest with both disks."""

    def __init__(self, host: Host) -> None:
        super().__init__(host, _NAME, [*FREEZE, *MERGE])

    def write(self) -> None:
        """The VM's file, and an empty xfs for its guest to take."""
        xfs = self.host.folder / "xfs.raw"
        with xfs.open("wb") as file:
            file.truncate(_XFS_BYTES)
        # So small a one is for tests only, it says.
        subprocess.run(["mkfs.xfs", "-q", "--unsupported", str(xfs)], check=True)
        self.write_config("cpus: 2", f"swap: {_XFS_BYTES}", f"extra_disks: [{{path: {xfs}, read_only: true}}]")

    async def prepare(self) -> None:
        """Give both folders to the guest."""
        await self.sh(
            f"mkdir -p {_EXT4} {_XFS}; swapoff -a; {DISKS}; "
            f"for to in /dev/$swap {_KEPT_IMAGE}; do dd if=/dev/$extra0 of=$to bs=1M conv=sparse 2>&1; done; "
            f"{_MOUNT_KEPT}"
        )
        await self.mount()

    async def mount(self) -> None:
        """Mount the xfs on the second disk."""
        await self.sh(f"{DISKS}; mount -t xfs /dev/$swap {_XFS}")

    async def digest(self) -> str:
        return await self.sh(f"cd {_EXT4} && md5sum still-*; cd {_XFS} && md5sum still-*")

    async def write_more(self) -> None:
        """Have both disks hold what no frozen file holds."""
        await self.sh(f"for f in {_EXT4} {_XFS}; do head -c 1M /dev/urandom >$f/other; done; sync")


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    if shutil.which("mkfs.xfs") is None:
        pytest.fail("mkfs.xfs is missing: tools/setup.sh installs xfsprogs")
    with own_host() as found:
        yield found


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def vm(host: Host) -> AsyncIterator[Disks]:
    found = Disks(host)
    found.write()
    async with running(found):
        await found.prepare()
        yield found


async def test_what_the_guest_wrote_is_given_back_once_it_is_frozen(vm: Disks) -> None:
    half = _WRITTEN // 2
    await vm.sh(
        f"for f in {_EXT4} {_XFS}; do head -c {half} /dev/urandom >$f/still-1; done; sync; "
        f"cat {_EXT4}/still-1 {_XFS}/still-1 | md5sum"
    )
    digest = await vm.digest()
    before = await vm.reclaim()
    await vm.freeze()
    after = await vm.reclaim()
    print(
        f"backing {before / MiB:.1f} MiB before the freeze, {after / MiB:.1f} MiB after; {_WRITTEN >> 20} MiB written"
    )
    assert before - after > 0.9 * _WRITTEN
    # Read by the guest's own processes, from what the pager brings back out of the frozen files.
    assert await vm.digest() == digest
    assert (await vm.status()).reclaim_refused == ""
    for path in vm.disks().glob("*.qcow2"):
        assert path.stat().st_mode & 0o777 == (0o600 if path.stem.endswith("-1") else 0o400)


async def test_rewriting_beside_freezes_merges_and_reclaims(vm: Disks) -> None:
    frozen = merged = rounds = 0
    while rounds < _ROUNDS and (frozen < 3 or merged < 2):
        rounds += 1
        work = asyncio.create_task(vm.rewriter("churn", str(_SECONDS), *_FOLDERS))
        while not work.done():
            # There is nothing to freeze before it has begun to write.
            frozen += any(disk.layer is not None for disk in await vm.freeze())
            await vm.reclaim(1)
            if any(disk.frozen > 2 for disk in (await vm.status()).disks):
                merged += len(await vm.merge())
                await vm.reclaim(1)
        said = await work
        print(f"{frozen} freezes, {merged} files merged away, {said.split()}")
    digest = await vm.digest()
    assert frozen >= 3
    assert merged >= 2
    assert await vm.digest() == digest
    assert not [line for line in (await vm.sh("dmesg")).splitlines() if COMPLAINTS.search(line)]


async def test_what_nothing_was_written_to_is_passed_over(vm: Disks) -> None:
    # A mounted xfs writes to its log by itself.
    await vm.sh(f"sync; umount {_XFS}")
    await vm.freeze()
    chains = vm.record()["chains"]
    said = await vm.host.command("freeze", _NAME)
    assert said.count(" not frozen: nothing was written to it since the last time\n") == 2
    assert "disk swap not frozen" in await vm.host.command("freeze", _NAME, "swap")
    assert vm.record()["chains"] == chains
    assert {path.stem for path in vm.disks().glob("*.qcow2")} >= {"root", "swap"}
    # A page is something.
    await vm.mount()
    await vm.sh(f"head -c 4k /dev/urandom >{_XFS}/other; sync")
    assert [(disk.disk, disk.layer is None) for disk in await vm.freeze()] == [("root", True), ("swap", False)]
    await vm.sh(f"head -c 4k /dev/urandom >{_EXT4}/other; sync")
    assert (await vm.freeze("root"))[0].layer is not None


async def test_layers_are_refused_to_other_hands(vm: Disks) -> None:
    async with vm.host.client() as client:
        with pytest.raises(RefusedError, match="frozen layer"):
            await client.qmp(_NAME, "block-commit", {"device": "disk-root", "base-node": "root"}, 10)
        with pytest.raises(RefusedError, match="hvaqemu freeze"):
            await client.qmp(_NAME, "block-stream", {"device": "disk-root"}, 10)


@pytest.mark.parametrize("point", FREEZE)
async def test_killed_in_a_freeze(vm: Disks, point: str) -> None:
    digest = await vm.digest()
    await vm.write_more()
    vm.arm(point)
    with pytest.raises(HvaError):
        await vm.freeze()
    assert not vm.armed(point)
    await vm.settled()
    await vm.reclaim()
    assert await vm.digest() == digest
    # No deeper than it may get, whoever died before that was seen to.
    async with asyncio.timeout(60):
        while any(disk.frozen > _DEPTH for disk in (await vm.status()).disks):  # noqa: ASYNC110
            await asyncio.sleep(0.2)


@pytest.mark.parametrize("point", MERGE)
async def test_killed_in_a_merge(vm: Disks, point: str) -> None:
    digest = await vm.digest()
    # A freeze may have been the one too many, after which all are merged by itself.
    while all(disk.frozen < 2 for disk in (await vm.status()).disks):
        await vm.write_more()
        await vm.freeze()
    await vm.reclaim()
    vm.arm(point)
    with suppress(HvaError):
        await vm.merge()
    async with asyncio.timeout(60):
        while vm.armed(point):
            # What waits for the last page that depends on a merged file is done beside.
            with suppress(HvaError):
                await vm.restore()
            await asyncio.sleep(0.2)
    await vm.settled()
    await vm.reclaim()
    assert await vm.digest() == digest


async def test_synced_data_is_there_after_qemu_was_killed(vm: Disks) -> None:
    promised = json.loads((await vm.rewriter("promise", *_KEPT)).splitlines()[0])
    await vm.freeze()
    digest = await vm.digest()
    qemu = vm.host.qemu()
    assert qemu is not None
    vm.host.send(qemu, signal.SIGKILL)
    files = [Path(path) for chain in vm.record()["chains"] for path in chain["files"]]
    await vm.host.command("down", _NAME)
    for path in files:
        if path.name.startswith("root"):
            check: list[str | Path] = ["qemu-img", "check", "-q", "-f", "qcow2", path]
            done = await asyncio.to_thread(subprocess.run, check, capture_output=True, text=True)
            # 3: clusters that nobody refers to, as every qcow2 file has whose writer was killed.
            assert done.returncode in (0, 3), done
    await vm.host.command("up", vm.file)
    await vm.sh(_MOUNT_KEPT)
    assert json.loads(await vm.rewriter("kept", *_KEPT)) == promised
    assert (await vm.sh(f"cd {_EXT4} && md5sum still-*")) in digest
    assert "XFS (loop0): Starting recovery" in await vm.sh("dmesg")
    status = await vm.settled()
    assert next(disk.frozen for disk in status.disks if disk.disk == "root") >= 1
    before = await vm.reclaim()
    assert before < 256 * MiB
    assert json.loads(await vm.rewriter("kept", *_KEPT)) == promised
