"""The guest agent dies, or stands still, in each state of the protocol: bounded waits, no page lost, then as before."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from itertools import product

import pytest
import pytest_asyncio

from hva_host.agent import epochs, guest_link
from hva_host.agent.guest_session import LinkState
from hva_host.agent.model import VmState
from hvaqemu.errors import DeadlineExceeded, HvaError, PeerLost
from hvaqemu.pages import STATE_MASK, PageState
from hvaqemu.units import MiB
from tests.vm.board import SERIAL, Board
from tests.vm.harness import BOTH, STEP_SECONDS, UNUSED, VOLATILE, Guest, running_guest, until

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(900)]

_MEMORY = 192 * MiB
#: The file that says what the next agents are to do and where, and a folder with a file until the first of them has.
_FAULT, _ONCE = "/run/hva-fault", "/run/once"
_STATES = ("detached", "greeted", "serving", "scanning", "confirming-1", "confirming-2", "executing")
#: Only an agent that has just started comes there.
_AT_START = ("detached", "greeted")
_TREE = "cat /usr/bin/[a-b]* | md5sum"


class Steward(Board):
    """Speaks to the program in the guest that needs no guest agent.

    :ivar how: what the agents do that have started last, in whichever state they are told to.
    """

    how = ""

    @property
    def agent(self) -> int:
        """The guest agent's process; 0: there is none."""
        return int(self.answer().get("agent", 0))

    @property
    def stopped(self) -> bool:
        """The guest agent stands still."""
        return bool(self.answer()["stopped"])

    @property
    def armed(self) -> bool:
        """No agent has come to the fault point yet."""
        return bool(self.answer()["armed"])


@pytest.fixture(scope="module")
def steward(tmp_path_factory: pytest.TempPathFactory) -> Steward:
    return Steward(tmp_path_factory.mktemp("disk") / "board.raw")


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def guest(steward: Steward) -> AsyncIterator[Guest]:
    async with running_guest("agents", memory=_MEMORY, extra_disks=[steward.disk]) as found:
        await found.run(
            f'sed -i "s|^exec|[ ! -e {_FAULT} ] \\|\\| export HVAQEMU_FAULT=\\$(cat {_FAULT})\\nexec|" '
            f"/usr/lib/hva/run-agent; grep -q FAULT /usr/lib/hva/run-agent; mkdir {_ONCE}"
        )
        await found.program("steward", SERIAL, _ONCE)
        await until(lambda: steward.agent, STEP_SECONDS, "the program in the guest")
        yield found
        assert await found.complaints() == []


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def tree(guest: Guest) -> str:
    return await guest.run(_TREE)


async def arm(guest: Guest, steward: Steward, state: str, how: str) -> None:
    """The next time that an agent comes to ``state``, it does ``how``."""
    another = steward.how != how
    if another:
        faults = ",".join(f"guest.{each}:{how}:{_ONCE}/{each}-{how}" for each in _STATES)
        await guest.run(f"echo {faults} >{_FAULT}")
        steward.how = how
    await steward.do("make", f"{_ONCE}/{state}-{how}")
    await until(lambda: steward.armed, STEP_SECONDS, "the fault to be armed")
    if another or state in _AT_START:
        with pytest.raises(PeerLost):
            # Its own answer is lost too: it kills who would send it.
            await guest.vm.execute(["sh", "-c", "kill -9 $PPID"], timeout=STEP_SECONDS)


async def come_to(guest: Guest, steward: Steward, state: str, how: str) -> None:
    """Do what brings an agent to ``state``, and see that whoever waits for it is told in time."""
    link = guest.vm.guest
    expected = PeerLost if how == "kill" else DeadlineExceeded
    # Whoever waits for an agent that was killed waits for its successor to say so.
    patience = STEP_SECONDS if how == "kill" else 1.0
    if state in _AT_START:
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
    # Whoever asked may have given up before the agent came to it.
    await until(lambda: not steward.armed, STEP_SECONDS, f"an agent that is {state}")


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


# Whoever does the same in another state needs no other agent, so these come one after the other.
@pytest.mark.parametrize(("how", "state"), list(product(("kill", "stop"), _STATES)))
async def test_an_agent_that_dies_or_stands_still(
    guest: Guest, steward: Steward, tree: str, state: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    guest.protection(monkeypatch, 3.0)
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
        await steward.do("signal", signal.SIGCONT)
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
