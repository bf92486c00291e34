"""Layers that change, vanish or can not be read: what matches is served, the rest is held, wrong bytes never come."""

from __future__ import annotations

import asyncio
import os
import shutil
import struct
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from hva_host.agent.pager_process import PagerHandle, call
from hva_host.memory.ledger import LEDGER_NAME
from hva_host.pager.process_files import descriptors
from hvaqemu.errors import LaunchError
from tests.kernel.faults import COPIES, Machine
from tests.kernel.harness import PAGE

ALTERED = 20
"""A block that tests damage; all others stay right."""


@pytest.fixture
async def machine(tmp_path: Path) -> AsyncIterator[Machine]:
    found = Machine(tmp_path, {"layer.read": "EIO"})
    try:
        await found.start()
        assert await found.epoch() is not None
        yield found
    finally:
        await found.close()


def golden(machine: Machine) -> Path:
    return machine.layers[0][0]


def alter(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(ALTERED * PAGE)
        file.write(b"altered")


async def all_but_altered(machine: Machine) -> asyncio.Task[int]:
    """What matches is served; who reads the altered block waits."""
    for pfn in (0, 63, ALTERED - 1, ALTERED + 1):
        assert await machine.read(pfn) in machine.expected[pfn]
    reading = asyncio.create_task(machine.read(ALTERED))
    (held,) = await machine.held()
    assert held["pages"] == [ALTERED]
    assert held["layer"] in (str(golden(machine)), "slot 0")
    assert str(golden(machine)) in f"{held['layer']} {held['reason']}"
    assert (await call(machine.pager, "resume"))["held"] == 1
    assert not reading.done()
    return reading


async def resumed(machine: Machine, reading: asyncio.Task[int]) -> None:
    assert (await call(machine.pager, "resume"))["held"] == 0
    assert await reading in machine.expected[ALTERED]
    await machine.check()
    assert (await call(machine.pager, "status"))["held"] == []


@pytest.mark.parametrize("killed", [False, True], ids=["same pager", "new pager"])
async def test_altered_in_place(machine: Machine, killed: bool) -> None:
    right = golden(machine).read_bytes()
    alter(golden(machine))
    if killed:
        await machine.replace_pager()
    reading = await all_but_altered(machine)
    golden(machine).write_bytes(right)
    await resumed(machine, reading)


@pytest.mark.parametrize("killed", [False, True], ids=["same pager", "new pager"])
async def test_truncated(machine: Machine, killed: bool) -> None:
    right = golden(machine).read_bytes()
    with golden(machine).open("r+b") as file:
        file.truncate(ALTERED * PAGE + 100)
    if killed:
        await machine.replace_pager()
    assert await machine.read(ALTERED - 1) in machine.expected[ALTERED - 1]
    reading = asyncio.create_task(machine.read(ALTERED))
    (held,) = await machine.held()
    assert f"ends inside block {ALTERED}" in held["reason"]
    golden(machine).write_bytes(right)
    await resumed(machine, reading)


@pytest.mark.parametrize("how", ["unlinked", "replaced"])
async def test_gone_from_its_path_but_open_in_qemu(machine: Machine, how: str) -> None:
    await machine.open(golden(machine))
    if how == "replaced":
        other = machine.folder / "other.raw"
        other.write_bytes(bytes(len(COPIES) * PAGE))
        other.replace(golden(machine))
    else:
        golden(machine).unlink()
    await machine.replace_pager()
    await machine.check()
    assert (await call(machine.pager, "status"))["held"] == []


async def test_replaced_and_open_nowhere(machine: Machine) -> None:
    other = machine.folder / "other.raw"
    shutil.copy(golden(machine), other)
    shutil.copy(golden(machine), machine.folder / "right.raw")
    alter(other)
    other.replace(golden(machine))
    await machine.replace_pager()
    reading = await all_but_altered(machine)
    # Repaired by putting another file in its place.
    (machine.folder / "right.raw").replace(golden(machine))
    await resumed(machine, reading)


async def test_unlinked_and_open_nowhere(machine: Machine) -> None:
    saved = golden(machine).rename(machine.folder / "elsewhere.raw")
    await machine.replace_pager()
    reading = asyncio.create_task(machine.read(ALTERED))
    (held,) = await machine.held()
    assert f"layer {golden(machine)}: No such file or directory" in held["reason"]
    saved.rename(golden(machine))
    await resumed(machine, reading)


@pytest.mark.parametrize("damage", ["missing", "cut", "flipped", "a directory"])
async def test_its_index_is_lost(machine: Machine, damage: str) -> None:
    index = machine.layers[0][1]
    data = index.read_bytes()
    index.unlink()
    if damage == "cut":
        index.write_bytes(data[: PAGE + 24])
    elif damage == "flipped":
        index.write_bytes(data[:PAGE] + bytes([data[PAGE] ^ 1]) + data[PAGE + 1 :])
    elif damage == "a directory":
        index.mkdir()
    # Another parent, which has not loaded it before.
    machine.parent.close()
    await machine.replace_pager()
    await machine.check()


async def test_its_index_is_cut_while_it_is_used(machine: Machine) -> None:
    index = machine.layers[0][1]
    index.chmod(0o600)
    with index.open("r+b") as file:
        file.truncate(0)
    await machine.check()
    assert machine.restarts == 0


async def test_its_index_is_lost_and_it_has_changed(machine: Machine) -> None:
    right = golden(machine).read_bytes()
    alter(golden(machine))
    machine.layers[0][1].unlink()
    machine.parent.close()
    await machine.replace_pager()
    reading = asyncio.create_task(machine.read(ALTERED))
    (held,) = await machine.held()
    assert "it has changed, and its index" in held["reason"]
    golden(machine).write_bytes(right)
    await resumed(machine, reading)


async def test_a_read_error(machine: Machine) -> None:
    machine.arm("layer.read")
    reading = asyncio.create_task(machine.read(ALTERED))
    (held,) = await machine.held()
    assert f"Input/output error (at fault point layer.read) at block {ALTERED}" in held["reason"]
    await resumed(machine, reading)


def rewrite(ledger: Path, old: bytes, new: bytes) -> None:
    """Change the first layer's path in a ledger, as whoever has the memfd could."""
    assert len(old) == len(new)
    with ledger.open("r+b") as file:
        file.seek(PAGE)
        slot = file.read(PAGE)
        assert old in slot
        file.seek(PAGE)
        file.write(slot.replace(old, new))


async def test_a_ledger_that_names_a_file_nobody_gave(machine: Machine, tmp_path: Path) -> None:
    """A compromised QEMU writes its ledger: its pager, perhaps root's, must not read that file to the guest."""
    secret = tmp_path / "secret.raw"
    shutil.copy(golden(machine), secret)
    name = str(golden(machine)).encode()
    fd = next(fd for fd, link in descriptors(machine.child.pid).items() if LEDGER_NAME in link)
    path = Path(f"/proc/{machine.child.pid}/fd/{fd}")
    machine.kill_pager()
    await asyncio.to_thread(rewrite, path, name, str(secret).encode())
    await machine.restarted(1)
    reading = asyncio.create_task(machine.read(ALTERED))
    (held,) = await machine.held()
    assert "QEMU does not have it open any more" in held["reason"]
    assert not any("secret" in link for link in descriptors(machine.pager.pid).values())
    reading.cancel()


async def test_a_held_page_that_must_be_read_from_the_disk_stays_held_until_it_is_right(machine: Machine) -> None:
    right = golden(machine).read_bytes()
    alter(golden(machine))
    reading = await all_but_altered(machine)
    # On the disk and out of the page cache: the pager's own thread must not wait for it.
    with golden(machine).open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    assert (await call(machine.pager, "resume"))["held"] == 1
    golden(machine).write_bytes(right)
    with golden(machine).open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    assert (await call(machine.pager, "resume"))["held"] in (0, 1)
    assert await reading in machine.expected[ALTERED]
    assert (await call(machine.pager, "status"))["held"] == []


async def test_a_ledger_that_names_itself_as_a_layer(machine: Machine) -> None:
    """Opening and closing it again would drop the pager's lock, and let a second one in beside it."""
    fd = next(fd for fd, link in descriptors(machine.child.pid).items() if LEDGER_NAME in link)
    path = Path(f"/proc/{machine.child.pid}/fd/{fd}")
    status, layer = path.stat(), golden(machine).stat()
    machine.kill_pager()
    await asyncio.to_thread(
        rewrite, path, struct.pack("=QQ", layer.st_dev, layer.st_ino), struct.pack("=QQ", status.st_dev, status.st_ino)
    )
    golden(machine).unlink()
    machine.layers[0][1].unlink()
    # Another parent, which has not loaded the index: what is tried as the layer is found wrong, and closed.
    machine.parent.close()
    await machine.restarted(1)
    reading = asyncio.create_task(machine.read(ALTERED))
    assert await machine.held()
    (machine.folder / "second").mkdir()
    second = PagerHandle(machine.folder / "second", machine.parent, lambda _name, _data: None)
    with pytest.raises(LaunchError, match="another pager serves this VM"):
        await second.start(machine.child.pid, ())
    reading.cancel()
