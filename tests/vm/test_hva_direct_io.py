"""A disk with direct I/O: epochs are bracketed by a pause, which nobody's death leaves behind or undoes for another."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress

import pytest
import pytest_asyncio

from hvaqemu.errors import HvaError, LaunchError, PeerLost
from hvaqemu.faultpoints import VARIABLE
from hvaqemu.reclaim_config import ReclaimState
from hvaqemu.units import MiB
from tests.vm.host import Host, own_host

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(600)]

POINTS = ["agent.drain.recorded", "agent.drain.stopped", "agent.drain.resumed", "agent.epoch.drained"]
_NAME = "direct"
_ALL = list(ReclaimState)
#: Writes and reads the direct disk past its own page cache and through it, and verifies every block: for so many
#: seconds, and until so many blocks were right.
_WORK = """
import hashlib, mmap, os, random, sys, time
BLOCK, BLOCKS = 65536, 64
def content(number, turn):
    seed = hashlib.sha512(b"%d %d" % (number, turn)).digest()
    return b"".join(seed + (page * 64 + part).to_bytes(8, "big") * 7 + b"direct  " for page in range(16)
                    for part in range(32))
buffer = mmap.mmap(-1, BLOCK)
# Disks are found in any order.
name = next(name for name in os.listdir("/sys/block") if name.startswith("vd")
            and open("/sys/block/%s/serial" % name).read().strip() == "extra0")
disk = os.open("/dev/" + name, os.O_RDWR)
past = os.open("/dev/" + name, os.O_RDWR | os.O_DIRECT)
turns, end, checked = {}, time.monotonic() + float(sys.argv[1]), 0
while time.monotonic() < end or checked < int(sys.argv[2]):
    number = random.randrange(BLOCKS)
    if number in turns:
        if random.random() < 0.5:
            os.posix_fadvise(disk, number * BLOCK, BLOCK, os.POSIX_FADV_DONTNEED)
            got = os.pread(disk, BLOCK, number * BLOCK)
        else:
            os.preadv(past, [buffer], number * BLOCK)
            got = buffer[:]
        if got != content(number, turns[number]):
            sys.exit("mismatch: block %d" % number)
        checked += 1
    turns[number] = turns.get(number, 0) + 1
    os.pwrite(disk, content(number, turns[number]), number * BLOCK)
    # Clean, so that it can be read from the disk again.
    os.fdatasync(disk)
print(checked)
"""


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    with own_host() as found, pytest.MonkeyPatch.context() as patch:
        found.folder.mkdir(exist_ok=True)
        found.environment[VARIABLE] = ",".join(f"{name}:kill:{found.folder / name}" for name in POINTS)
        for name, value in found.environment.items():
            patch.setenv(name, value)
        yield found


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def direct(host: Host) -> AsyncIterator[Host]:
    """A VM with a direct disk that runs."""
    disk = host.folder / "direct.raw"
    with disk.open("wb") as file:
        file.truncate(64 * MiB)
    file_ = host.folder / "vm.yaml"
    file_.write_text(
        f"name: {_NAME}\nmemory: 256M\ncpus: 2\nallow_exec: true\nboot_timeout: 240s\n"
        f"extra_disks: [{{path: {disk}, direct: true}}]\n"
    )
    await host.command("up", file_)
    yield host
    await host.command("down", _NAME)
    await host.all_gone()


async def work_in_guest(host: Host, seconds: int, blocks: int) -> int:
    """How many blocks were right."""
    await host.connected(_NAME)
    async with host.client() as client:
        done = await client.run(_NAME, ["python3", "-B", "-c", _WORK, str(seconds), str(blocks)], 200)
    assert done.ok, done
    return int(done.stdout)


async def reclaim(host: Host) -> list[dict[str, float]]:
    """What its epochs took, in seconds; none where the host agent died."""
    seconds: list[dict[str, float]] = []
    with suppress(HvaError):
        async with host.client() as client:
            await client.reclaim(_NAME, _ALL, 3, lambda stats: seconds.append(stats["seconds"]))
    return seconds


async def status(host: Host) -> dict[str, object]:
    """How the guest is, from QEMU's own monitor, through whichever host agent there is by now."""
    async with asyncio.timeout(60):
        while True:
            with suppress(PeerLost, LaunchError):
                async with host.client():
                    return dict(json.loads(await host.command("qmp", _NAME, "query-status")))
            await asyncio.sleep(0.1)


async def test_it_is_really_direct(direct: Host) -> None:
    nodes = json.loads(await direct.command("qmp", _NAME, "query-named-block-nodes"))
    assert [node["node-name"] for node in nodes if node["cache"]["direct"]] == ["extra0-direct"]


async def test_io_under_continuous_epochs_is_right(direct: Host) -> None:
    work = asyncio.create_task(work_in_guest(direct, 12, 20))
    pauses: list[float] = []
    while not work.done():
        pauses += [seconds["paused"] for seconds in await reclaim(direct)]
    assert await work >= 20
    print(f"{len(pauses)} epochs, paused {sum(pauses):.3f} s in all, {max(pauses) * 1000:.1f} ms at the longest")
    assert len([pause for pause in pauses if pause > 0]) >= 3
    shown = await direct.command("status", _NAME)
    assert "PAUSED" in shown.upper()
    assert (await status(direct))["running"]


@pytest.mark.parametrize("point", POINTS)
async def test_a_host_agent_that_dies_in_the_bracket_leaves_no_guest_paused(direct: Host, point: str) -> None:
    (direct.folder / point).touch()
    await reclaim(direct)
    assert not (direct.folder / point).exists(), "nobody came to the point"
    assert (await status(direct))["running"]
    assert await work_in_guest(direct, 1, 1) > 0


async def test_a_guest_that_its_operator_paused_stays_paused(direct: Host) -> None:
    await direct.command("qmp", _NAME, "stop")
    try:
        seconds = await reclaim(direct)
        assert seconds
        assert not any(each["paused"] for each in seconds)
        assert not (await status(direct))["running"]
        # Nor does the next host agent let it go on.
        await direct.command("agent", "--stop")
        assert not (await status(direct))["running"]
    finally:
        await direct.command("qmp", _NAME, "cont")
    assert (await status(direct))["running"]
