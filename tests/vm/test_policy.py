"""Memory that comes back by itself, from real guests that notice nothing and verify everything."""

from __future__ import annotations

import asyncio
import math
import os
import signal
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hva_host.agent import pager_keeper
from hva_host.agent.model import VmState
from hva_host.agent.vm import Vm
from hva_host.policy import pacing, pressure
from hva_host.policy.decisions import Complaint, Phase
from hva_host.policy.samples import Limits
from hvaqemu.errors import DeadlineExceeded, RefusedError
from hvaqemu.reclaim_config import ReclaimConfig, ReclaimMode, ReclaimState
from hvaqemu.units import MiB
from tests.vm.harness import STEP_SECONDS, TREE, VOLATILE, Guest, running_guest, until

pytestmark = [pytest.mark.vm, pytest.mark.timeout(1800)]

FILL = "find /usr -xdev -type f -print0 | sort -z | xargs -0 md5sum | md5sum"
#: For what takes many steps of policy, or all of the guest's files.
LONG_SECONDS = 400.0
ALL = tuple(ReclaimState)
#: The host is never short by itself, whatever else runs beside a test.
AMPLE = Limits(available_bytes=0, psi_some=1.0, cgroup_headroom=0.0)


@pytest.fixture
async def guest(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Guest]:
    # Minutes at the default pace, more beside a build: that scans cost little is another test's subject.
    monkeypatch.setattr(pacing, "GUEST_SHARE_STEPPING", 0.5)
    async with running_guest("governed") as guest:
        guest.fleet.set_limits(AMPLE)
        yield guest


async def fill(guest: Guest) -> str:
    """Fill the guest's page cache; a checksum of what is in it."""
    return await guest.run(FILL, LONG_SECONDS)


async def backing(guest: Guest) -> int:
    """MiB of backing and store."""
    status = await guest.vm.pager_status()
    return int(status["backing_bytes"] + status["store_bytes"]) // MiB


async def shrunk(guest: Guest, size: int, seconds: float) -> None:
    """Wait until backing and store are at most ``size`` MiB."""
    deadline = time.monotonic() + seconds
    while (found := await backing(guest)) > size:
        assert time.monotonic() < deadline, f"{found} MiB of backing, not {size}: {guest.vm.view}"
        await asyncio.sleep(0.5)


def nothing_left(guest: Guest) -> list[dict[str, Any]]:
    """Warnings that no VM has anything left to take; others may come before."""
    warnings = [data for name, data in guest.events if name == "POLICY_WARNING"]
    return [data for data in warnings if data["complaint"] == Complaint.NOTHING_LEFT]


def reclaim(guest: Guest, mode: ReclaimMode, **more: Any) -> None:
    guest.fleet.set_reclaim("governed", ReclaimConfig(mode=mode, **more))


async def test_a_still_guest_shrinks_by_itself(guest: Guest) -> None:
    digest = await fill(guest)
    filled = await backing(guest)
    reclaim(guest, ReclaimMode.PROACTIVE, refault_budget="20%/min")
    await shrunk(guest, filled // 2, LONG_SECONDS)
    # What an idle guest uses, it keeps: hardly anything of what went came back.
    status = await guest.vm.pager_status()
    assert status["refault_pages"] < status["discarded_pages"] / 10
    # And all of it comes back right, beside whatever policy makes of that.
    assert await fill(guest) == digest
    assert not await guest.complaints()


def phase(guest: Guest) -> Phase | None:
    return guest.vm.view.phase if guest.vm.view is not None else None


async def test_a_guest_that_uses_its_cache_again_and_again_is_left_alone(guest: Guest) -> None:
    """Its working set is the whole tree; policy finds out, pauses, and what it costs stays near the budget."""
    digest = await guest.tree_digest()
    reclaim(guest, ReclaimMode.PROACTIVE)
    reading = asyncio.create_task(read_on(guest, digest, 60.0))
    await until(lambda: phase(guest) in (Phase.COOLING, Phase.HOLDING) or reading.done(), 120.0, "policy to notice")
    await reading
    status = await guest.vm.pager_status()
    # Had all of it gone at once, each round would have brought all of it back.
    assert status["refault_pages"] < 40_000
    assert not await guest.complaints()


async def read_on(guest: Guest, digest: str, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        assert await guest.run(TREE) == digest


async def test_a_target_is_reached_kept_and_left_again(guest: Guest) -> None:
    digest = await fill(guest)
    reclaim(guest, ReclaimMode.TARGET, target=200 * MiB, states=ALL)
    await shrunk(guest, 205, LONG_SECONDS)
    assert await fill(guest) == digest
    await shrunk(guest, 205, LONG_SECONDS)
    reclaim(guest, ReclaimMode.MANUAL)
    assert await fill(guest) == digest
    grown = await backing(guest)
    assert grown > 300
    await asyncio.sleep(10.0)
    assert await backing(guest) >= grown - 8, "nobody asked for it"


async def test_off_means_nobody(guest: Guest) -> None:
    reclaim(guest, ReclaimMode.OFF)
    with pytest.raises(RefusedError, match="reclaim is off"):
        await guest.epoch(VOLATILE)
    reclaim(guest, ReclaimMode.MANUAL)
    await guest.epoch(VOLATILE)


async def test_a_host_budget_takes_from_who_does_not_use_it(guest: Guest) -> None:
    """Mode pressure: nothing happens until the host has less than it is to have."""
    digest = await fill(guest)
    filled = await backing(guest)
    reclaim(guest, ReclaimMode.PRESSURE)
    await asyncio.sleep(5.0)
    assert await backing(guest) >= filled - 8
    guest.fleet.set_limits(replace(AMPLE, budget_bytes=250 * MiB))
    await shrunk(guest, 255, STEP_SECONDS)
    guest.fleet.set_limits(AMPLE)
    assert await fill(guest) == digest
    assert not await guest.complaints()


async def test_a_budget_that_can_not_be_kept_is_said_loudly(guest: Guest) -> None:
    reclaim(guest, ReclaimMode.PRESSURE, min_resident=32 * MiB)
    guest.fleet.set_limits(replace(AMPLE, budget_bytes=16 * MiB, balloon=False))
    await until(lambda: nothing_left(guest), LONG_SECONDS, "a warning")
    assert nothing_left(guest)[0]["missing_bytes"] > 0


async def test_pressure_takes_no_more_than_it_needs_and_never_goes_below_min_resident(guest: Guest) -> None:
    await fill(guest)
    filled = await backing(guest)
    least = filled - 60
    reclaim(guest, ReclaimMode.PRESSURE, min_resident=least * MiB)
    guest.fleet.set_limits(replace(AMPLE, budget_bytes=200 * MiB, balloon=False))
    lowest = filled
    async with asyncio.timeout(LONG_SECONDS):
        while not nothing_left(guest):
            lowest = min(lowest, int((await guest.vm.pager_status())["backing_bytes"]) // MiB)
            await asyncio.sleep(0.1)
    assert least <= lowest <= least + 8
    assert not await guest.complaints()


async def test_what_policy_does_not_decide_on_counts_for_the_budget(guest: Guest) -> None:
    reclaim(guest, ReclaimMode.MANUAL)
    guest.fleet.set_limits(replace(AMPLE, budget_bytes=16 * MiB))
    await until(lambda: nothing_left(guest), LONG_SECONDS, "a warning")
    assert await backing(guest) > 16


async def filled_beside_another(guest: Guest) -> Vm:
    """The guest has filled its memory, and there is another; both are under policy."""
    await fill(guest)
    config = guest.vm.config.model_copy(update={"name": "another", "memory": 256 * MiB})
    another = await guest.fleet.up(config, print)
    guest.fleet.set_reclaim("another", ReclaimConfig(mode=ReclaimMode.PRESSURE))
    reclaim(guest, ReclaimMode.PRESSURE)
    await until(lambda: another.view is not None, STEP_SECONDS, "a first look")
    return another


async def test_a_qemu_that_dies_does_not_end_policy_for_the_others(guest: Guest) -> None:
    another = await filled_beside_another(guest)
    os.kill(another.process.pid, signal.SIGKILL)
    await another.wait_gone()
    guest.fleet.set_limits(replace(AMPLE, budget_bytes=250 * MiB))
    await shrunk(guest, 255, STEP_SECONDS)


async def test_a_pager_that_stands_still_keeps_nobody_else_from_being_decided_on(
    guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    # It would be replaced by one that answers.
    monkeypatch.setattr(pager_keeper, "_STUCK_SECONDS", 600.0)
    another = await filled_beside_another(guest)
    os.kill(another.pager.pid, signal.SIGSTOP)
    try:
        guest.fleet.set_limits(replace(AMPLE, budget_bytes=350 * MiB))
        await shrunk(guest, 300, STEP_SECONDS)
    finally:
        os.kill(another.pager.pid, signal.SIGCONT)


async def test_what_a_balloon_took_is_recorded_and_given_back_where_policy_no_longer_decides(
    guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A host that is not short for a while has it given back also where policy decides.
    monkeypatch.setattr(pressure, "CALM_SECONDS", math.inf)
    reclaim(guest, ReclaimMode.PRESSURE)
    await guest.vm.balloon(400 * MiB, STEP_SECONDS, taken=112 * MiB)
    record = guest.vm.folder.load()
    assert record is not None and record.ballooned_bytes == 112 * MiB
    # What somebody else takes stays taken.
    await guest.vm.balloon(384 * MiB, STEP_SECONDS, taken=64 * MiB)
    # As QEMU's last event of it, which comes late, would have it.
    guest.vm.balloon_bytes = 400 * MiB
    reclaim(guest, ReclaimMode.MANUAL)
    await until(lambda: guest.vm.balloon_bytes == 448 * MiB, STEP_SECONDS, "what was taken")
    await until(lambda: not guest.vm.record.ballooned_bytes, STEP_SECONDS, "a record of it")


async def test_a_balloon_that_came_to_an_end_on_its_way_stays_there_and_no_more_is_owed(
    guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pressure, "CALM_SECONDS", math.inf)
    reclaim(guest, ReclaimMode.PRESSURE)
    memory, given, qmp = guest.vm.config.memory, 64 * MiB, guest.vm.qmp
    balloon = qmp.balloon

    async def is_late(size: int, timeout: float) -> int:
        await balloon(memory - given, timeout)
        # However long the test is kept waiting, the guest comes no further.
        await qmp.pause()
        await qmp.execute("balloon", {"value": size})
        raise DeadlineExceeded("balloon: the guest is on its way")

    with monkeypatch.context() as patch:
        patch.setattr(qmp, "balloon", is_late)
        with pytest.raises(DeadlineExceeded):
            await guest.vm.balloon(memory - 256 * MiB, STEP_SECONDS, taken=256 * MiB)
    await qmp.cont()
    await until(lambda: guest.vm.state is VmState.RUNNING, STEP_SECONDS, "the guest to go on")
    await asyncio.sleep(2.0)
    assert memory - await qmp.balloon_actual() == given
    assert guest.vm.record.ballooned_bytes == given
    reclaim(guest, ReclaimMode.MANUAL)
    await until(lambda: not guest.vm.record.ballooned_bytes, STEP_SECONDS, "a record of it")
    assert await qmp.balloon_actual() == memory


async def test_a_control_group_that_is_nearly_full_counts(guest: Guest) -> None:
    digest = await fill(guest)
    guest.fleet.set_limits(replace(AMPLE, cgroup_headroom=Limits().cgroup_headroom))
    reclaim(guest, ReclaimMode.PRESSURE)
    with group_of(guest.qemu_pid) as group:
        (group / "memory.limit_in_bytes").write_text(str(1024 * MiB))
        # What QEMU has so far is charged elsewhere; what comes back is charged here.
        await guest.vm.reclaim((VOLATILE,))
        assert await fill(guest) == digest
        used = int((group / "memory.usage_in_bytes").read_text())
        (group / "memory.limit_in_bytes").write_text(str(used + 8 * MiB))
        before = await backing(guest)
        await shrunk(guest, before - 10, STEP_SECONDS)
    assert await fill(guest) == digest


@contextmanager
def group_of(pid: int) -> Iterator[Path]:
    """A control group (version 1) of its own for a process."""
    group = Path(f"/sys/fs/cgroup/memory/hva-policy-{os.getpid()}")
    lines = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
    home = next((line.split(":", 2)[2] for line in lines if "memory" in line.split(":")[1].split(",")), None)
    if home is None or not os.access("/sys/fs/cgroup/memory", os.W_OK):
        pytest.skip("no memory control group that could be made")
    group.mkdir()
    try:
        (group / "cgroup.procs").write_text(str(pid))
        yield group
    finally:
        (Path("/sys/fs/cgroup/memory") / home.lstrip("/") / "cgroup.procs").write_text(str(pid))
        group.rmdir()
