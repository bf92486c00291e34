"""A further disk that a guest only reads is a layer, as its image is: page cache of it is discarded and comes back."""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import pytest_asyncio

from hvaqemu.config import ExtraDisk
from hvaqemu.errors import RefusedError
from hvaqemu.units import MiB
from tests.vm.frozen import DISKS
from tests.vm.harness import BOTH, STEP_SECONDS, Guest, running_guest, until

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(600)]

_FILES = 48
_DIGEST = "cd /mnt && md5sum file-* | md5sum"


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A raw ext4 with files that no other disk has."""
    folder = tmp_path_factory.mktemp("disk")
    tree, made = folder / "tree", folder / "data.raw"
    tree.mkdir()
    for number in range(_FILES):
        (tree / f"file-{number}").write_bytes(os.urandom(MiB))
    subprocess.run(["mke2fs", "-q", "-t", "ext4", "-b", "4096", "-d", tree, made, "80M"], check=True)
    yield made
    made.unlink(missing_ok=True)


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def guest(disk: Path) -> AsyncIterator[Guest]:
    async with running_guest("reading", memory=256 * MiB, extra_disks=[ExtraDisk(path=disk, read_only=True)]) as found:
        await found.run(f"{DISKS}; mount -o ro /dev/$extra0 /mnt")
        yield found


@asynccontextmanager
async def written(disk: Path) -> AsyncIterator[None]:
    """While somebody has the disk's file open for writing."""
    # Not in the thread that has the lease, which must let the open through.
    file = await asyncio.to_thread(disk.open, "r+b")
    with file:
        yield


async def pages_of(guest: Guest, path: Path) -> int:
    """Pages that depend on a layer."""
    answer = await guest.vm.pager.link.call("layers")
    return sum(layer["pages"] for layer in answer["layers"] if layer["path"] == str(path))


async def test_page_cache_of_a_read_only_disk_is_discarded_and_comes_back(guest: Guest, disk: Path) -> None:
    await guest.vm.reclaim(BOTH)
    before = await guest.run(_DIGEST)
    filled = (await guest.vm.measure()).backing_bytes
    await guest.vm.reclaim(BOTH)
    settled = (await guest.vm.measure()).backing_bytes
    depend = await pages_of(guest, disk)
    print(f"{filled / MiB:.1f} -> {settled / MiB:.1f} MiB; {depend} pages depend on the disk")
    assert filled - settled > 0.9 * _FILES * MiB
    assert depend > 0.9 * _FILES * MiB // 4096
    # From the guest's page cache, which is what the pager brings back: the guest reads nothing from the disk.
    reads = "cut -d' ' -f3 /sys/block/vd?/stat | md5sum"
    said = await guest.run(reads)
    assert await guest.run(_DIGEST) == before
    assert await guest.run(reads) == said
    assert await pages_of(guest, disk) < 0.1 * depend
    assert await guest.complaints() == []


async def test_it_can_not_be_frozen(guest: Guest, disk: Path) -> None:
    with pytest.raises(RefusedError, match=f"extra0 is {disk}, a file of yours"):
        await guest.vm.freeze("extra0")


async def test_it_is_watched(guest: Guest, disk: Path) -> None:
    async with written(disk):
        await until(
            lambda: "has it open for writing" in guest.vm.refusals.text, STEP_SECONDS, "the writer to be told of"
        )
        assert disk.name in guest.vm.refusals.text
        with pytest.raises(RefusedError, match="open for writing"):
            await guest.vm.reclaim(BOTH)
    await until(lambda: not guest.vm.refusals.text, STEP_SECONDS, "it to be trusted again")
    await guest.vm.reclaim(BOTH, epochs=1)


async def test_one_that_somebody_writes_is_refused_or_left_out(disk: Path) -> None:
    async with written(disk):
        with pytest.raises(RefusedError, match="has it open for writing") as caught:
            async with running_guest("refused", extra_disks=[ExtraDisk(path=disk, read_only=True)]):
                pass
        assert "layer: false" in caught.value.hint
        left_out = ExtraDisk(path=disk, read_only=True, layer=False)
        async with running_guest("leftout", memory=256 * MiB, extra_disks=[left_out]) as guest:
            await guest.vm.reclaim(BOTH, epochs=1)
            assert disk not in [image for image, _ in guest.vm.record.layers]
