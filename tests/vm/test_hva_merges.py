"""A merge that does not come to its end: one that stands still, is interrupted or cancelled, whose host agent or QEMU
dies meanwhile. The chain is right each time, the next merge begins with it, and the last one comes to its end.

What slows a merge down is what an operator has for it: QEMU's own commands for block jobs, through a monitor of his own
where they must come within milliseconds, else by ``hvaqemu qmp``.
"""

from __future__ import annotations

import asyncio
import re
import signal
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from qemu.qmp import ExecuteError, QMPClient

from hvaqemu.errors import HvaError
from hvaqemu.units import MiB, format_duration
from tests.vm.frozen import FOLDER, Frozen, running
from tests.vm.harness import COMPLAINTS, until
from tests.vm.host import Host, own_host

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(1200)]

_NAME = "merges"
_JOB = "hva-merge-root"
#: Long enough for a merge to be met with while it goes on.
_MIB = 96
#: No two clusters alike.
_WRITE = (
    'import os, sys; piece = os.urandom(1 << 20); file = open("rewritten", "wb"); '
    '[file.write(b"%8d" % number + piece[8:]) for number in range(int(sys.argv[1]))]'
)
#: How long a merge that moves nothing is put up with.
_PATIENCE = 20.0
_SECONDS = 60.0
#: Less than our patience with a merge would take, which must not be what ends a command.
_AT_ONCE = 15.0
#: So many merges may be over before they are met with, because this process was kept waiting.
_TRIES = 3
_ALL_OVER = f"{_TRIES} merges were over before anything could be done to them"
#: Seconds after which a merge is interrupted: from its first step on until it has long ended.
_MOMENTS = (0.02, 0.1, 0.3)

PAUSE = ("block-job-pause", {"device": _JOB})
THROTTLE = ("block-job-set-speed", {"device": _JOB, "speed": 1})


class Merges(Frozen):
    """The guest, and hands on its merges."""

    def __init__(self, host: Host) -> None:
        super().__init__(host, _NAME, ["agent.merge.dropped:EIO"])
        self.content = ""
        self.monitor = host.folder / "own.sock"

    async def digest(self) -> str:
        return await self.sh(f"cd {FOLDER} && md5sum still rewritten")

    async def two_files(self) -> None:
        """Have two frozen files, the upper one large, and pages that depend on both."""
        if self.frozen() == 2:
            return
        await self.sh(f"cd {FOLDER}; head -c 1M /dev/urandom >small; sync")
        if self.frozen() < 1:
            await self.freeze()
        await self.sh(f"cd {FOLDER}; rm -f rewritten; sync; python3 -Bc '{_WRITE}' {_MIB}; sync")
        await self.freeze()
        await self.reclaim(1)
        assert self.frozen() == 2
        self.content = await self.digest()

    def frozen(self) -> int:
        return len(self.record()["chains"][0]["files"]) - 1

    async def met(self, hand: tuple[str, Mapping[str, Any]], over: Callable[[], bool]) -> bool:
        """Do something to a merge as soon as it is under way; does it stand still now?

        :param over: whether it came to its end before that.
        """
        command, arguments = hand
        monitor = QMPClient("own")
        await monitor.connect(str(self.monitor))
        try:
            async with asyncio.timeout(_SECONDS):
                while not over():
                    with suppress(ExecuteError):
                        await monitor.execute(command, dict(arguments))
                        break
                    # Sooner than an event would be through all who hand it on.
                    await asyncio.sleep(0.001)
                jobs = await monitor.execute("query-jobs")
        finally:
            await monitor.disconnect()
        assert isinstance(jobs, list)
        return any(job["id"] == _JOB and job["current-progress"] < job["total-progress"] for job in jobs)

    async def begun(self, hand: tuple[str, Mapping[str, Any]]) -> asyncio.Task[list[str]]:
        """A merge that was met with by ``hand`` and stands still."""
        for _ in range(_TRIES):
            await self.two_files()
            merge = asyncio.create_task(self.merge())
            if await self.met(hand, merge.done):
                return merge
            await merge
        pytest.fail(_ALL_OVER)

    async def jobs(self) -> list[dict[str, Any]]:
        async with self.host.client() as client:
            return list(await client.qmp(_NAME, "query-jobs", {}, 10))

    async def right(self, frozen: int) -> None:
        """See that all is as if there had been no merge, or the whole of it."""
        status = await self.settled(_PATIENCE + _SECONDS)
        assert self.frozen() == frozen
        assert await self.jobs() == []
        await self.reclaim(1)
        assert await self.digest() == self.content
        assert (await self.status()).held == []
        assert status.reclaim_refused == ""
        for path in self.record()["chains"][0]["files"][:-1]:
            assert Path(path).stat().st_mode & 0o777 == 0o400
            self.check(Path(path))

    def check(self, path: Path) -> None:
        """See that a file that nobody writes is sound; what lies about in it is what every interrupted job leaves."""
        check: list[str | Path] = ["qemu-img", "check", "-q", "-f", "qcow2", "-U", path]
        done = subprocess.run(check, capture_output=True, text=True)
        assert done.returncode in (0, 3), done


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    with own_host() as found:
        yield found


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def vm(host: Host) -> AsyncIterator[Merges]:
    found = Merges(host)
    own = f"qemu_args: [-qmp, 'unix:{found.monitor},server=on,wait=off']"
    found.write_config(f"freeze: {{patience: {_PATIENCE:g}s}}", own)
    async with running(found):
        await found.sh(f"mkdir -p {FOLDER}; head -c 4M /dev/urandom >{FOLDER}/still")
        yield found


@pytest.mark.parametrize("hand", [PAUSE, THROTTLE], ids=["paused", "throttled"])
async def test_one_that_moves_nothing_is_taken_back(vm: Merges, hand: tuple[str, Mapping[str, Any]]) -> None:
    merge = await vm.begun(hand)
    nothing = re.escape(f"it moved nothing for {format_duration(_PATIENCE)}")
    async with asyncio.timeout(_PATIENCE + _SECONDS):
        with pytest.raises(HvaError, match=f"disk root: the merge was taken back.*{nothing}"):
            await merge
    await vm.right(2)


async def test_interrupted(vm: Merges) -> None:
    for _ in range(_TRIES):
        await vm.two_files()
        command = await asyncio.create_subprocess_exec(
            *vm.host.argv("merge", _NAME), env=vm.host.full_environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        if await vm.met(PAUSE, lambda: command.returncode is not None):  # noqa: B023
            break
        await command.communicate()
        assert command.returncode == 0
    else:
        pytest.fail(_ALL_OVER)
    command.send_signal(signal.SIGINT)
    async with asyncio.timeout(_AT_ONCE):
        await command.communicate()
    assert command.returncode == 130
    await vm.right(2)


async def test_interrupted_at_any_moment(vm: Merges) -> None:
    for seconds in _MOMENTS:
        await vm.two_files()
        merge = asyncio.create_task(vm.merge())
        await asyncio.wait({merge}, timeout=seconds)
        merge.cancel()
        await asyncio.wait({merge})
        await vm.settled()
        await vm.right(vm.frozen())
        # What was begun is known to the pager as it is recorded: pages can depend on each frozen file.
        layers = {path for path, _ in vm.record()["layers"]}
        assert layers.issuperset(vm.record()["chains"][0]["files"][:-1])


async def test_cancelled_by_the_operator(vm: Merges) -> None:
    merge = await vm.begun(THROTTLE)
    async with vm.host.client() as client:
        await client.qmp(_NAME, "block-job-cancel", {"device": _JOB}, 10)
    with pytest.raises(HvaError, match=r"the merge was taken back.*: Operation canceled"):
        await merge
    await vm.right(2)


async def test_the_host_agent_killed_while_it_stands_still(vm: Merges) -> None:
    merge = await vm.begun(PAUSE)
    (agent,) = vm.host.agents()
    vm.host.send(agent, signal.SIGKILL)
    with pytest.raises(HvaError):
        await merge
    # The next one finds it, and puts up with it as long as with one of its own.
    await vm.right(2)


async def test_a_file_that_can_not_be_deleted_is_told_of_and_tried_again(vm: Merges) -> None:
    await vm.two_files()
    # What an earlier merge left would be the first to be deleted.
    await vm.host.command("restore", _NAME)
    await until(lambda: not vm.record()["retired"], _SECONDS, "files of earlier merges to be deleted")
    await vm.reclaim(1)
    vm.arm("agent.merge.dropped")
    (gone,) = await vm.merge()
    await vm.right(1)
    # Until no page depends on it.
    await vm.host.command("restore", _NAME)
    await until(lambda: not vm.armed("agent.merge.dropped"), _SECONDS, "the file to be deleted")
    log = vm.host.runtime / "agent.log"
    await until(lambda: "DELETE_FAILED" in log.read_text(), _SECONDS, "word of it")
    said = next(line for line in log.read_text().splitlines() if "DELETE_FAILED" in line)
    assert gone in said
    assert "WARNING" in said
    await until(lambda: not Path(gone).exists(), _SECONDS, "the file to be deleted")
    assert (await vm.status()).disks[0].retired_bytes == 0
    assert "TASK_FAILED" not in log.read_text()


async def test_qemu_killed_in_the_midst(vm: Merges) -> None:
    await vm.two_files()
    await vm.sh("sync")
    merge = await vm.begun(PAUSE)
    qemu = vm.host.qemu()
    assert qemu is not None
    vm.host.send(qemu, signal.SIGKILL)
    with pytest.raises(HvaError):
        await merge
    files = [Path(path) for path in vm.record()["chains"][0]["files"]]
    await vm.host.command("down", _NAME)
    for path in files:
        vm.check(path)
    await vm.host.command("up", vm.file)
    assert await vm.digest() == vm.content
    await vm.right(2)
    await vm.merge()
    await vm.right(1)
    assert not [line for line in (await vm.sh("dmesg")).splitlines() if COMPLAINTS.search(line)]
    assert await vm.reclaim() < 256 * MiB
