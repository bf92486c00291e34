"""Pager and host agent of a real guest die at each of their named points, as users run them: a process of its own."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress

import pytest
import pytest_asyncio

from hvaqemu.errors import HvaError, LaunchError, PeerLost
from hvaqemu.faultpoints import VARIABLE
from hvaqemu.reclaim_config import DEFAULT_STATES
from tests.vm.harness import STEP_SECONDS, until
from tests.vm.host import Host, own_host

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(900)]

#: The pager's others are gone through in tests/kernel/test_kills.py; these meet the guest's own accesses.
PAGER = [
    "pager.epoch.protecting",
    "pager.discard.stored",
    "pager.discard.punch",
    "pager.write.left",
    "pager.epoch.confirmed",
    "pager.epoch.unprotecting",
    "pager.refault.read",
    "pager.refault.checked",
    "pager.refault.filled",
    "pager.parent.fork",
]
AGENT = ["agent.epoch.scanned", "agent.epoch.begun", "agent.epoch.protected", "agent.epoch.answered"]
ADOPT = ["agent.adopt.found", "agent.adopt.connected"]
UP = ["agent.up.disks", "agent.up.launched", "agent.up.recorded", "agent.up.attached", "agent.up.running"]
_NAME = "points"
_VM = f"name: {_NAME}\nmemory: 256M\ncpus: 2\nallow_exec: true\nboot_timeout: 240s\n"
_ROUNDS = 6
#: Keeps memory in motion: pages are freed, reused and written while they are protected.
_RESTLESS = (
    "(while :; do dd if=/dev/zero of=/dev/shm/x bs=1M count=8; rm /dev/shm/x; usleep 20000; done) >/dev/null 2>&1 &"
)
_DIGEST = "find /etc /usr/sbin -xdev -type f -print0 | sort -z | xargs -0 md5sum | md5sum"


class Points:
    """A host whose processes die at points that are armed."""

    def __init__(self, host: Host) -> None:
        self.host = host
        host.folder.mkdir(exist_ok=True)
        names = [*PAGER, *AGENT, *ADOPT, *UP]
        host.environment[VARIABLE] = ",".join(f"{name}:kill:{host.folder / name}" for name in names)
        self.file = host.folder / "vm.yaml"
        self.file.write_text(_VM)

    def arm(self, point: str) -> None:
        (self.host.folder / point).touch()

    def armed(self, point: str) -> bool:
        return (self.host.folder / point).exists()

    def kill(self, *pids: int) -> None:
        for pid in pids:
            assert self.host.send(pid, signal.SIGKILL)

    async def sh(self, script: str) -> str:
        """What a script prints, asked again when the host agent dies while it runs."""
        async with asyncio.timeout(120):
            while True:
                # It died, or the one that was started in its place did.
                with suppress(PeerLost, LaunchError):
                    async with self.host.client() as client:
                        done = await client.run(_NAME, ["sh", "-c", script], 100)
                    assert done.ok, done
                    return done.stdout.decode()
                await asyncio.sleep(0.1)

    async def reclaim(self) -> bool:
        """Whether it went through; it does not where something died in it."""
        with suppress(HvaError):
            async with self.host.client() as client:
                await client.reclaim(_NAME, DEFAULT_STATES, None, lambda _stats: None)
                return True
        return False


@pytest.fixture(scope="module")
def points() -> Iterator[Points]:
    with own_host() as host, pytest.MonkeyPatch.context() as patch:
        found = Points(host)
        for name, value in host.environment.items():
            patch.setenv(name, value)
        yield found


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def digest(points: Points) -> AsyncIterator[str]:
    """A VM that runs, and the checksum of its files."""
    await points.host.command("up", points.file)
    await points.sh(_RESTLESS)
    yield await points.sh(_DIGEST)
    assert "Kernel panic" not in await points.sh("dmesg")
    await points.host.command("down", _NAME)
    await points.host.all_gone()


@pytest.mark.parametrize("point", UP)
async def test_in_up(points: Points, point: str) -> None:
    """A start that was cut off leaves nothing, or a VM that can be taken down. Before this module's VM is there."""
    points.arm(point)
    with pytest.raises(AssertionError, match="host agent"):
        await points.host.command("up", points.file)
    assert not points.armed(point)
    vms = json.loads(await points.host.command("ls", "--json"))
    if point == "agent.up.running":
        assert [vm["name"] for vm in vms] == [_NAME]
        await points.host.command("down", _NAME)
    else:
        assert vms == []
    await until(lambda: points.host.qemu() is None and not points.host.pagers(), STEP_SECONDS, "nothing to be left")
    for folder in (points.host.runtime, points.host.state):
        assert not list((folder / "vms").glob("*")), f"{folder} is not empty"


@pytest.mark.parametrize("point", [*PAGER, *AGENT])
async def test_while_reclaiming_and_reading(points: Points, digest: str, point: str) -> None:
    points.arm(point)
    if point == "pager.parent.fork":
        points.kill(*points.host.pagers())
    for _ in range(_ROUNDS):
        await points.reclaim()
        assert await points.sh(_DIGEST) == digest
        if not points.armed(point):
            break
    assert not points.armed(point), "nobody came to the point"
    assert await points.reclaim()


@pytest.mark.parametrize("point", ADOPT)
async def test_while_adopting(points: Points, digest: str, point: str) -> None:
    assert await points.reclaim()
    points.kill(*points.host.agents(), *points.host.pagers())
    points.arm(point)
    assert await points.sh(_DIGEST) == digest
    assert not points.armed(point)
    assert await points.reclaim()
    assert await points.sh(_DIGEST) == digest
