"""How a VM is: what QEMU tells of the guest, and HELD, which no QEMU knows of. Every change is an event."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hva_host.agent.hold import Hold
from hva_host.agent.model import VmState
from hvaqemu.errors import PeerLost, RefusedError
from hvaqemu.qemu import logs
from hvaqemu.qemu.events import GuestPanicked, QmpEvent, Reset, Resume, Shutdown, Stop
from hvaqemu.qemu.qmp import RunStatus

#: How the kernel begins its last message (kernel/panic.c), and how far back on the console to look for it, in bytes.
_PANIC = "Kernel panic - "
_CONSOLE_BYTES = 32768

Listener = Callable[[str, dict[str, Any]], None]


class Condition:
    """One VM's.

    :param console_log: where a panic says why.
    :param hold: whether it is held.
    :param tell: told of every change.
    :ivar failure: done once the VM can not go on; says why. Whoever waits for the VM races this.
    """

    def __init__(self, name: str, console_log: Path, hold: Hold, tell: Listener) -> None:
        self.failure: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._name = name
        self._console_log = console_log
        self._hold = hold
        self._tell = tell
        self._state = VmState.STARTING
        self._reason = ""
        self._told = VmState.STARTING

    @property
    def state(self) -> VmState:
        over = self._state in (VmState.STOPPING, VmState.PANICKED, VmState.GONE)
        return VmState.HELD if self._hold.active and not over else self._state

    @property
    def reason(self) -> str:
        """Why it is in that state, or ""."""
        return self._hold.reason if self.state is VmState.HELD else self._reason

    def refuse_when_still(self) -> None:
        """
        :raise RefusedError: the guest will never answer, or not before its operator did something.
        :raise PeerLost: QEMU has ended.
        """
        self._hold.refuse(self._name)
        self.refuse_when_gone()
        if self._state is VmState.PANICKED:
            raise RefusedError(f"VM {self._name}: {self._reason}", f"see 'hvaqemu console {self._name}'")

    def refuse_when_gone(self) -> None:
        """:raise PeerLost: QEMU has ended."""
        if self._state is VmState.GONE:
            raise PeerLost(f"VM {self._name} has ended: {self._reason}", f"'hvaqemu down {self._name}' clears it away")

    def on_qmp_event(self, event: QmpEvent) -> None:
        """Follow QEMU's own account of the guest."""
        if isinstance(event, GuestPanicked):
            self._fail(VmState.PANICKED, self._why_panicked())
        elif isinstance(event, Shutdown):
            self._enter(VmState.STOPPING, event.reason)
        elif isinstance(event, Stop) and self._state is VmState.RUNNING:
            self._enter(VmState.PAUSED, "stopped by QMP")
        elif isinstance(event, Resume) and self._state in (VmState.PAUSED, VmState.STARTING):
            self._enter(VmState.RUNNING)
        elif isinstance(event, Reset):
            self._tell("VM_RESET", {"name": self._name, "guest": event.guest})

    def catch_up(self, status: RunStatus) -> None:
        """QEMU's answer to how the guest is, after its events were not heard for a while."""
        if status.running:
            self._enter(VmState.RUNNING)
        elif status.status == "guest-panicked":
            self._fail(VmState.PANICKED, self._why_panicked())
        else:
            self._enter(VmState.PAUSED, status.status)

    def running(self) -> None:
        """The guest runs now."""
        self._enter(VmState.RUNNING)

    def gone(self, why: str) -> None:
        """QEMU has ended."""
        self._fail(VmState.GONE, why if self._state is not VmState.STOPPING else f"{self._reason}: {why}")

    def hold_changed(self) -> None:
        """The hold has begun, ended, or has another reason."""
        if self._hold.active:
            self._give_up(self._hold.reason)
        self._tell_state()

    def _enter(self, state: VmState, reason: str = "") -> None:
        if self._state not in (VmState.GONE, state):
            self._state, self._reason = state, reason
            self._tell_state()

    def _fail(self, state: VmState, why: str) -> None:
        self._enter(state, why)
        self._give_up(why)

    def _give_up(self, why: str) -> None:
        if not self.failure.done():
            self.failure.set_result(why)

    def _tell_state(self) -> None:
        if (state := self.state) is not self._told:
            self._told = state
            self._tell("VM_STATE", {"name": self._name, "state": state, "reason": self.reason})

    def _why_panicked(self) -> str:
        """What the guest's kernel said of its end; what it prints after that is a call trace."""
        said = logs.tail(self._console_log, _CONSOLE_BYTES).splitlines()
        reasons = [line for line in said if _PANIC in line]
        return f"the guest's kernel panicked: {reasons[-1] if reasons else logs.one_line(chr(10).join(said), 2)}"
