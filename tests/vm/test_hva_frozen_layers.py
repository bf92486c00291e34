"""What a guest wrote becomes a layer while it goes on writing; whoever dies meanwhile, no byte of it is lost.

One guest, with ext4 on its root disk and xfs on a second disk of its own (the one it might swap to).
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
from typing import Any

import pytest
import pytest_asyncio

from hva_host.agent.model import VmStatus
from hvaqemu.errors import HvaError, LaunchError, PeerLost, RefusedError
from hvaqemu.faultpoints import VARIABLE
from hvaqemu.scenario_config import DEFAULT_STATES
from hvaqemu.units import MiB
from tests.vm.harness import COMPLAINTS
from tests.vm.host import Host, own_host
from tests.vm.programs import bundle, start_command

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(900)]

_NAME = "frozen"
#: mkfs.xfs makes none that is smaller.
_XFS_BYTES = 320 * MiB
_EXT4, _XFS = "/var/tmp/frozen", "/mnt/frozen"
_FOLDERS = (_EXT4, _XFS)
_SECONDS = 10
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


class Frozen:
    """The guest, and the host agent that may die at any point that is armed."""

    def __init__(self, host: Host) -> None:
        self.host = host
        host.folder.mkdir(exist_ok=True)
        points = ",".join(f"{name}:kill:{host.folder / name}" for name in (*FREEZE, *MERGE))
        host.environment[VARIABLE] = points
        self.file = host.folder / "vm.yaml"

    def write_config(self) -> None:
        """The VM's file, and an empty xfs for its guest to take."""
        xfs = self.host.folder / "xfs.raw"
        with xfs.open("wb") as file:
            file.truncate(_XFS_BYTES)
        subprocess.run(["mkfs.xfs", "-q", str(xfs)], check=True)
        self.file.write_text(
            f"name: {_NAME}\nmemory: 256M\ncpus: 2\nallow_exec: true\nboot_timeout: 240s\nkeep_disks: true\n"
            f"swap: {_XFS_BYTES}\nextra_disks: [{{path: {xfs}, read_only: true}}]\n"
        )

    async def sh(self, script: str, stdin: bytes = b"", argv: tuple[str, ...] = ()) -> str:
        """What a script prints, asked again when the host agent dies while it runs."""
        async with asyncio.timeout(240):
            while True:
                with suppress(PeerLost, LaunchError):
                    async with self.host.client() as client:
                        done = await client.run(_NAME, list(argv) or ["sh", "-c", script], 200, stdin)
                    assert done.ok, done
                    return done.stdout.decode()
                await asyncio.sleep(0.1)

    async def rewriter(self, *words: str) -> str:
        return await self.sh("", bundle(), tuple(start_command("rewriter", *words)))

    async def prepare(self) -> None:
        """Give both folders to the guest."""
        await self.sh(
            f"mkdir -p {_EXT4} {_XFS}; swapoff -a; cd /sys/block; for d in vd*; do"
            ' [ "$(cat $d/serial)" = swap ] && to=$d; [ "$(cat $d/serial)" = extra0 ] && from=$d; done;'
            f" dd if=/dev/$from of=/dev/$to bs=1M conv=sparse 2>/dev/null && mount -t xfs /dev/$to {_XFS}"
        )

    async def freeze(self) -> None:
        async with self.host.client() as client:
            await client.freeze(_NAME, None, lambda _event, _data: None)

    async def merge(self) -> list[str]:
        async with self.host.client() as client:
            return await client.merge(_NAME, None, lambda _event, _data: None)

    async def reclaim(self, epochs: int | None = None) -> int:
        """Bytes of backing afterwards."""
        async with self.host.client() as client:
            return (await client.reclaim(_NAME, DEFAULT_STATES, epochs, lambda _stats: None)).backing_after_bytes

    async def status(self) -> VmStatus:
        async with self.host.client() as client:
            return await client.status(_NAME)

    def arm(self, point: str) -> None:
        (self.host.folder / point).touch()

    def armed(self, point: str) -> bool:
        return (self.host.folder / point).exists()

    def disks(self) -> Path:
        return self.host.state / "vms" / _NAME

    def record(self) -> dict[str, Any]:
        return dict(json.loads((self.host.runtime / "vms" / _NAME / "vm.json").read_text()))

    async def digest(self) -> str:
        return await self.sh(f"cd {_EXT4} && md5sum still-*; cd {_XFS} && md5sum still-*")


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    if shutil.which("mkfs.xfs") is None:
        pytest.fail("mkfs.xfs is missing: tools/setup.sh installs xfsprogs")
    with own_host() as found:
        yield found


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def vm(host: Host) -> AsyncIterator[Frozen]:
    found = Frozen(host)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in host.environment.items():
            patch.setenv(name, value)
        found.write_config()
        await host.command("up", found.file)
        await found.prepare()
        yield found
        await host.command("down", _NAME, "--delete-disks")
        await host.all_gone()


async def settled(vm: Frozen) -> VmStatus:
    """Once every frozen file is a layer and nothing is under way, which a new host agent sees to by itself."""
    async with asyncio.timeout(60):
        while True:
            with suppress(HvaError):
                status, record = await vm.status(), vm.record()
                begun = record["merging"] or any(chain["pending"] for chain in record["chains"])
                if not begun and all(disk.indexed == disk.frozen for disk in status.disks):
                    return status
            await asyncio.sleep(0.1)


async def test_what_the_guest_wrote_is_given_back_once_it_is_frozen(vm: Frozen) -> None:
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


async def test_rewriting_beside_freezes_merges_and_reclaims(vm: Frozen) -> None:
    work = asyncio.create_task(vm.rewriter("churn", str(_SECONDS), *_FOLDERS))
    frozen = merged = 0
    while not work.done():
        await vm.freeze()
        await vm.reclaim(1)
        frozen += 1
        if frozen % 2 == 0:
            merged += len(await vm.merge())
            await vm.reclaim(1)
    said = await work
    digest = await vm.digest()
    print(f"{frozen} freezes, {merged} files merged away, {said.split()}")
    assert frozen >= 3
    assert merged >= 2
    assert await vm.digest() == digest
    assert not [line for line in (await vm.sh("dmesg")).splitlines() if COMPLAINTS.search(line)]


async def test_layers_are_refused_to_other_hands(vm: Frozen) -> None:
    async with vm.host.client() as client:
        with pytest.raises(RefusedError, match="frozen layer"):
            await client.qmp(_NAME, "block-commit", {"device": "disk-root", "base-node": "root"}, 10)
        with pytest.raises(RefusedError, match="hvaqemu freeze"):
            await client.qmp(_NAME, "block-stream", {"device": "disk-root"}, 10)


@pytest.mark.parametrize("point", FREEZE)
async def test_killed_in_a_freeze(vm: Frozen, point: str) -> None:
    digest = await vm.digest()
    await vm.sh(f"head -c 1M /dev/urandom >{_EXT4}/other; sync")
    vm.arm(point)
    with pytest.raises(HvaError):
        await vm.freeze()
    assert not vm.armed(point)
    status = await settled(vm)
    await vm.reclaim()
    assert await vm.digest() == digest
    # No deeper than it may get, and nothing lies about that the chain does not need.
    assert all(disk.frozen <= 9 for disk in status.disks)


@pytest.mark.parametrize("point", MERGE)
async def test_killed_in_a_merge(vm: Frozen, point: str) -> None:
    digest = await vm.digest()
    await vm.freeze()
    await vm.reclaim()
    vm.arm(point)
    with suppress(HvaError):
        await vm.merge()
    async with asyncio.timeout(60):
        while vm.armed(point):
            # What waits for the last page that depends on a merged file is done beside.
            await vm.sh(f"cat {_EXT4}/* {_XFS}/* | md5sum; echo 3 >/proc/sys/vm/drop_caches")
            await asyncio.sleep(0.5)
    await settled(vm)
    await vm.reclaim()
    assert await vm.digest() == digest


async def test_synced_data_is_there_after_qemu_was_killed(vm: Frozen) -> None:
    promised = json.loads((await vm.rewriter("promise", *_FOLDERS)).splitlines()[0])
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
    kept = {path: each for path, each in promised.items() if path.startswith(_EXT4)}
    found = json.loads(await vm.rewriter("kept", _EXT4))
    assert found == kept
    assert (await vm.sh(f"cd {_EXT4} && md5sum still-*")) in digest
    status = await settled(vm)
    assert next(disk.frozen for disk in status.disks if disk.disk == "root") >= 1
    before = await vm.reclaim()
    assert before < 256 * MiB
    assert json.loads(await vm.rewriter("kept", _EXT4)) == kept
