"""Guests whose agent is replaced by a liar, beside one that is honest; a host agent with liars in QEMU's place."""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from itertools import accumulate
from pathlib import Path

import pytest
import pytest_asyncio

from hva_host.agent.background import LOG_FILE, connect_or_start
from hva_host.agent.client import ControlClient
from hva_host.agent.model import StallStats, VmState
from hvaqemu.config import VmConfig
from hvaqemu.errors import HvaError, PeerLost
from hvaqemu.paths import runtime_dir
from hvaqemu.qemu.launch import AGENT_SOCKET
from hvaqemu.units import MiB
from tests.liars.guest import PAGES
from tests.unit.control_stand_ins import short_folder
from tests.vm.harness import (
    BOOT_SECONDS,
    BOTH,
    STEP_SECONDS,
    UNUSED,
    VOLATILE,
    Guest,
    alive,
    running_guest,
    until,
)

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(900)]

_ROOT = Path(__file__).parents[2]
#: Of the root disk itself, through the guest's page cache: 64 MiB.
_READ = "dd if=/dev/vda of=/dev/null bs=64k count=1024"
_SECONDS = re.compile(r"copied, ([0-9.e-]+) s")
#: Rounds of a loop that takes a core some 10 ms, and how many such loops a second a liar may cost: four tenths of the
#: core. A machine that is slow for what else it does is slow at both.
_ROUNDS = 300_000
_LOOPS = 40.0


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def honest() -> AsyncIterator[Guest]:
    async with running_guest("honest", memory=256 * MiB, cpus=1) as found:
        yield found


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def liar(honest: Guest) -> AsyncIterator[Guest]:
    async with running_guest("liar", memory=192 * MiB, cpus=1) as found:
        yield found


async def _lying(guest: Guest) -> None:
    while True:
        with suppress(HvaError):
            if (await guest.vm.guest.wait_connected(STEP_SECONDS)).kernel == "liar":
                return
        await asyncio.sleep(0.05)


async def lie(guest: Guest, way: str) -> None:
    """Replace the agent by a liar; returns once that has attached."""
    with suppress(PeerLost):
        # The answer is lost where the liar kills the agent before it could say it.
        await guest.program("liar", way)
    async with asyncio.timeout(STEP_SECONDS):
        await _lying(guest)


async def honest_again(guest: Guest) -> None:
    """Have the liar end, and wait until the agent serves."""
    async with asyncio.timeout(STEP_SECONDS):
        while guest.vm.guest.hello is None or guest.vm.guest.hello.kernel == "liar":
            with suppress(HvaError):
                await guest.vm.execute(["end"], timeout=5)
            await asyncio.sleep(0.05)
        await guest.vm.guest.wait_connected(STEP_SECONDS)


class Neighbour:
    """The honest guest's refaults in one situation."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        #: Of each turn: seconds a vCPU waited for a page, on average.
        self.means: list[float] = []
        #: Waits of all turns, by the longest that is counted with them.
        self._waits = Counter[float]()

    async def read_again(self, guest: Guest) -> None:
        """Discard page cache and have the guest read it, timed by its own clock."""
        discarded = (await guest.epoch(VOLATILE)).discarded_layer
        before = await self._stalls(guest)
        said = await guest.run(_READ + " 2>&1")
        after = await self._stalls(guest)
        found = _SECONDS.search(said)
        assert found is not None, said
        assert discarded > 8000
        self.seconds.append(float(found[1]))
        self.means.append((after.sum_s - before.sum_s) / (after.count - before.count))
        self._waits.update({bucket.upper_s: bucket.count for bucket in after.buckets})
        self._waits.subtract({bucket.upper_s: bucket.count for bucket in before.buckets})

    async def _stalls(self, guest: Guest) -> StallStats:
        return (await guest.vm.status()).stalls

    def quantile(self, share: float) -> float:
        """The wait, to within a factor of two, that a ``share`` of all did not exceed."""
        lengths = sorted(self._waits)
        seen = accumulate(self._waits[length] for length in lengths)
        return next(length for length, count in zip(lengths, seen, strict=True) if count >= share * self._waits.total())


def loops(share: float) -> float:
    """A share of a core as loops a second, of which this machine does so many now."""
    began = time.thread_time()
    sum(number % 7 for number in range(_ROUNDS))
    return share / (time.thread_time() - began)


async def test_a_flood_costs_its_neighbour_what_a_busy_guest_does(honest: Guest, liar: Guest) -> None:
    """Alternating: the guest beside it computes, or floods its port; the processor is as busy either way."""
    tree = await honest.tree_digest()
    await honest.run(_READ)
    spin, flood = Neighbour(), Neighbour()
    costs = []
    for _ in range(3):
        shares = []
        for way, neighbour in (("spin", spin), ("flood", flood)):
            await lie(liar, way)
            counters = liar.vm.guest.counters
            heard = counters.unsolicited
            if way == "flood":
                await until(lambda: counters.unsolicited > heard + 1000, STEP_SECONDS, "a flood")  # noqa: B023
            cpu, began, heard = time.process_time(), time.monotonic(), counters.unsolicited
            await neighbour.read_again(honest)
            seconds, frames = time.monotonic() - began, counters.unsolicited - heard
            shares.append((time.process_time() - cpu) / seconds)
            print(f"{way}: host {shares[-1]:.1%} of a core, {frames / seconds:.0f} frames a second")
            if way == "flood":
                assert frames, "it went on meanwhile"
            await honest_again(liar)
        # What the test itself does is in both.
        costs.append(loops(shares[1] - shares[0]))
    print(f"a flood costs {costs} loops a second")
    for way, neighbour in (("spin", spin), ("flood", flood)):
        waits = ", ".join(f"{neighbour.quantile(share) * 1e6:.0f}" for share in (0.5, 0.99))
        print(f"{way}: {min(neighbour.seconds):.3f} s, stall {min(neighbour.means) * 1e6:.0f} µs; {waits} µs")
    # Something else may take a turn's time, hardly that of all of them.
    assert min(costs) < _LOOPS
    assert min(flood.seconds) < 2 * min(spin.seconds) + 0.1
    assert min(flood.means) < 3 * min(spin.means) + 100e-6
    assert flood.quantile(0.5) <= 2 * spin.quantile(0.5)
    assert flood.quantile(0.99) < 4 * spin.quantile(0.99) + 2e-3
    assert await honest.tree_digest() == tree
    assert await honest.complaints() == []
    assert await liar.complaints() == []


async def test_a_guest_that_calls_everything_unused_harms_itself_alone(honest: Guest, liar: Guest) -> None:
    layers = [image for image, _ in honest.vm.record.layers]
    sums = [await asyncio.to_thread(_checksum, image) for image in layers]
    tree = await honest.tree_digest()
    lost = honest.heard("PAGER_LOST") + liar.heard("PAGER_LOST")
    await lie(liar, "unused")
    discarded = 0
    for _ in range(3):
        if discarded < 10_000:
            with suppress(HvaError):
                discarded += (await liar.epoch(UNUSED)).discarded_zero
    # Its kernel and all: what it ran on is gone.
    assert discarded > 10_000
    status = await liar.vm.status()
    assert status.pager_pid and alive(status.pager_pid)
    assert status.state in (VmState.RUNNING, VmState.PANICKED, VmState.GONE)
    assert not status.held

    # One may be late where others take the processor, as it would be without the liar.
    notes = [(await honest.epoch(UNUSED, VOLATILE)).note for _ in range(3)]
    assert "" in notes
    await honest.run(_READ)
    assert await honest.tree_digest() == tree
    assert await honest.complaints() == []
    assert honest.heard("PAGER_LOST") + liar.heard("PAGER_LOST") == lost
    assert [await asyncio.to_thread(_checksum, image) for image in layers] == sums
    # What is left of it would not follow a request to shut down.
    liar.vm.process.send_signal(signal.SIGKILL)


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()


# A host agent's process


@contextmanager
def liar_at(path: Path, way: str) -> Iterator[None]:
    """A liar in QEMU's place, at the path of its socket."""
    path.unlink(missing_ok=True)
    command = [sys.executable, "-m", "tests.liars.guest", way, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=_ROOT) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"listening\n"
            yield
        finally:
            process.kill()


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def rss(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def attached(client: ControlClient) -> None:
    async with asyncio.timeout(STEP_SECONDS):
        while not (await client.status("swapped")).guest_connected:  # noqa: ASYNC110
            await asyncio.sleep(0.05)


@asynccontextmanager
async def connected(runtime: Path) -> AsyncIterator[ControlClient]:
    """A client of the host agent, which is started where none runs."""
    client = await connect_or_start(runtime, 60)
    try:
        yield client
    finally:
        await client.close()


async def test_a_host_agent_serves_on_whatever_speaks_in_a_guest_agent_s_place() -> None:
    with short_folder() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("HVAQEMU_RUNTIME_DIR", str(folder / "r"))
        patch.setenv("HVAQEMU_STATE_DIR", str(folder / "s"))
        runtime = runtime_dir()
        try:
            async with connected(runtime) as client:
                config = VmConfig(name="swapped", memory=PAGES << 12, cpus=1, boot_timeout=BOOT_SECONDS)
                await client.up(config, print)
                await client.quit()
            # QEMU's socket keeps its listener under another name; the host agent knows one only.
            socket = runtime / "vms" / "swapped" / AGENT_SOCKET
            kept = socket.with_name("kept.sock")
            socket.rename(kept)
            with liar_at(socket, "honest"):
                # A new one, which finds that in QEMU's place.
                async with connected(runtime) as client:
                    await attached(client)
            async with connected(runtime) as client:
                await one_liar_after_the_other(client, runtime, socket)
                socket.unlink()
                kept.rename(socket)
                await attached(client)
                result = await client.reclaim("swapped", BOTH, None, print)
            assert result.discarded > 3000
            assert (runtime / LOG_FILE).stat().st_size < 64 * 1024
        finally:
            async with connected(runtime) as client:
                with suppress(HvaError):
                    await client.down("swapped")
                await client.quit()


async def one_liar_after_the_other(client: ControlClient, runtime: Path, socket: Path) -> None:
    agent = int((runtime / "agent.lock").read_text())
    begun = rss(agent)
    # What asking for the status costs, all ways have in common.
    asked_only = 0.0
    for way in ("honest", "restarts", "output", "magics", "tiny pieces"):
        with liar_at(socket, way):
            # Until it goes on at its own pace.
            await asyncio.sleep(0.5)
            cpu, since = cpu_seconds(agent), time.monotonic()
            answers = []
            while time.monotonic() - since < 2.0:
                asked = time.monotonic()
                assert (await client.status("swapped")).state is VmState.RUNNING
                answers.append(time.monotonic() - asked)
                await asyncio.sleep(0.2)
            share = (cpu_seconds(agent) - cpu) / (time.monotonic() - since)
            if way == "honest":
                asked_only = share
            cost, grown = loops(share - asked_only), rss(agent) - begun
            print(
                f"{way}: {share:.1%} of a core, {cost:.1f} loops a second, {grown >> 10} KiB, "
                f"status in {max(answers) * 1e3:.0f} ms at most"
            )
            assert cost < _LOOPS
            assert grown < 24 * MiB
            # A guest that does not answer is waited for a while: 2 s.
            assert max(answers) < 20.0
