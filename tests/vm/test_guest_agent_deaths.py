"""The guest agent dies, or stands still, in each state of the protocol: bounded waits, no page lost, then as before."""

from __future__ import annotations

import asyncio
import signal
import struct
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from hva_host.agent import epochs, guest_link
from hva_host.agent.guest_session import LinkState
from hva_host.agent.model import VmState
from hvaqemu.errors import DeadlineExceeded, HvaError, PeerLost
from hvaqemu.pages import STATE_MASK, PageState
from hvaqemu.units import MiB
from tests.vm.harness import (
    BOTH,
    GUEST_PROGRAMS,
    STEP_SECONDS,
    UNUSED,
    VOLATILE,
    Guest,
    running_guest,
    until,
)

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(900)]

_MEMORY = 192 * MiB
_ORDER = struct.Struct(">QQ")
_ANSWER = struct.Struct(">QQcB")
#: The file that says what the next agents are to do and where, and a folder with a file until the first of them has.
_FAULT, _ONCE = "/run/hva-fault", "/run/once"
_STATES = ("detached", "greeted", "serving", "scanning", "confirming-1", "confirming-2", "executing")
_TREE = "cat /usr/bin/[a-b]* | md5sum"


class Steward:
    """The program in the guest that needs no guest agent."""

    def __init__(self, disk: Path) -> None:
        self.disk = disk
        self._number = 0

    async def order(self, number: signal.Signals) -> None:
        """Have the guest agent sent a signal; returns once it was."""
        self._number += 1
        with self.disk.open("r+b") as file:
            file.write(_ORDER.pack(self._number, number))
        await until(lambda: self._answer()[0] == self._number, STEP_SECONDS, f"{number.name} in the guest")

    @property
    def agent(self) -> int:
        """The guest agent's process; 0: there is none."""
        return int(self._answer()[1])

    @property
    def stopped(self) -> bool:
        """The guest agent stands still."""
        return bool(self._answer()[2] == b"T")

    @property
    def armed(self) -> bool:
        """No agent has come to the fault point yet."""
        return bool(self._answer()[3])

    def _answer(self) -> tuple[int, int, bytes, int]:
        with self.disk.open("rb") as file:
            file.seek(4096)
            number, agent, state, armed = _ANSWER.unpack(file.read(_ANSWER.size))
        return number, agent, state, armed


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("disk") / "orders.raw"
    path.write_bytes(bytes(MiB))
    return path


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def guest(disk: Path) -> AsyncIterator[Guest]:
    async with running_guest("agents", memory=_MEMORY, extra_disks=[disk]) as found:
        await found.run(
            f'sed -i "s|^exec|[ ! -e {_FAULT} ] \\|\\| export HVAQEMU_FAULT=\\$(cat {_FAULT})\\nexec|" '
            f"/usr/lib/hva/run-agent; grep -q FAULT /usr/lib/hva/run-agent; mkdir {_ONCE}"
        )
        await found.python(GUEST_PROGRAMS / "steward.py", "extra0", _ONCE)
        yield found
        assert await found.complaints() == []


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def steward(guest: Guest, disk: Path) -> Steward:
    made = Steward(disk)
    await until(lambda: made.agent, STEP_SECONDS, "the program in the guest")
    return made


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def tree(guest: Guest) -> str:
    return await guest.run(_TREE)


async def arm(guest: Guest, steward: Steward, state: str, how: str) -> None:
    """Another agent starts, and does ``how`` where it comes to ``state``."""
    # A file of its own: the agent that runs is armed for what came before.
    once = f"{_ONCE}/{state}-{how}"
    await guest.run(f"echo guest.{state}:{how}:{once} >{_FAULT}; : >{once}")
    await until(lambda: steward.armed, STEP_SECONDS, "the fault to be armed")
    with pytest.raises(PeerLost):
        # Its own answer is lost too: it kills who would send it.
        await guest.vm.execute(["sh", "-c", "kill -9 $PPID"], timeout=STEP_SECONDS)


async def come_to(guest: Guest, steward: Steward, state: str, how: str) -> None:
    """Do what brings an agent to ``state``, and see that whoever waits for it is told in time."""
    link = guest.vm.guest
    expected = PeerLost if how == "kill" else DeadlineExceeded
    # Whoever waits for an agent that was killed waits for its successor to say so.
    patience = STEP_SECONDS if how == "kill" else 1.0
    if state in ("detached", "greeted"):
        await until(lambda: not steward.armed, STEP_SECONDS, f"an agent that is {state}")
        return
    await link.wait_connected(STEP_SECONDS)
    if state == "serving":
        with pytest.raises(expected):
            await link.ping(patience)
    elif state == "scanning":
        with pytest.raises(expected):
            await link.scan(patience)
    elif state == "executing":
        with pytest.raises(expected):
            await guest.vm.execute(["sleep", "60"], timeout=patience)
    else:
        # Free pages that the host has.
        await guest.run("dd if=/dev/zero of=/dev/shm/used bs=1M count=24 2>/dev/null; rm /dev/shm/used")
        before = guest.presence()
        stats = await guest.epoch(UNUSED)
        assert stats.note == "the guest agent did not confirm in time"
        assert stats.unconfirmed > 1000
        unused = guest.classes() & STATE_MASK == PageState.UNUSED
        assert not (before & unused & ~guest.presence()).any(), "what was not confirmed twice is not discarded"
    assert not steward.armed, f"no agent was {state}"


async def back(guest: Guest) -> None:
    """Wait until an agent serves."""

    async def answered() -> None:
        while True:
            try:
                await guest.vm.guest.wait_connected(STEP_SECONDS)
                await guest.vm.guest.ping(5.0)
                return
            except HvaError:
                await asyncio.sleep(0.05)

    async with asyncio.timeout(STEP_SECONDS):
        await answered()


@pytest.mark.parametrize("how", ["kill", "stop"])
@pytest.mark.parametrize("state", _STATES)
async def test_an_agent_that_dies_or_stands_still(
    guest: Guest, steward: Steward, tree: str, state: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(epochs, "_EPOCH_SECONDS", 0.5)
    monkeypatch.setattr(epochs, "_SCAN_SECONDS", 1.0)
    monkeypatch.setattr(guest_link, "_EXEC_GRACE", 1.0)
    await guest.epoch(VOLATILE)
    await arm(guest, steward, state, how)
    await come_to(guest, steward, state, how)

    if how == "stop":
        await until(lambda: steward.stopped, STEP_SECONDS, "an agent that stands still")
        attached = state != "detached"
        assert guest.vm.guest.state is (LinkState.ATTACHED if attached else LinkState.ATTACHING)
        status = await guest.vm.status()
        assert (status.state, status.guest_connected) == (VmState.RUNNING, attached)
        with pytest.raises(DeadlineExceeded if attached else PeerLost):
            await guest.vm.guest.ping(0.2)
        # Copies need nothing from the guest.
        assert status.measure is not None
        stats = await guest.epoch(*BOTH)
        assert stats.discarded_layer + status.measure.layer_pages > 1000
        unsolicited = guest.vm.guest.counters.unsolicited
        await steward.order(signal.SIGCONT)
        await back(guest)
        assert guest.vm.guest.counters.unsolicited > unsolicited or not attached, "late answers count for nothing"
    else:
        await back(guest)

    monkeypatch.undo()
    await guest.run("dd if=/dev/zero of=/dev/shm/used bs=1M count=24 2>/dev/null; rm /dev/shm/used; pkill sleep; true")
    stats = await guest.epoch(*BOTH)
    assert not stats.note
    assert stats.discarded_zero > 1000
    assert await guest.run(_TREE) == tree
    assert guest.vm.state is VmState.RUNNING
