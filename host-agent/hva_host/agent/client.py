"""A client of the host agent's control socket, and what starts a host agent where none runs."""

from __future__ import annotations

import asyncio
import base64
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from qemu.qmp import ConnectError, EventListener, ExecInterruptedError, ExecuteError, QMPClient, Runstate, StateError
from qemu.qmp.error import QMPError
from qemu.qmp.message import Message

from hva_host.agent import control_wire as wire
from hva_host.agent.history import VmReport
from hva_host.agent.model import ExecResult, FrozenDisk, ReclaimResult, VmStatus
from hvaqemu.config import VmConfig
from hvaqemu.errors import HvaError, PeerLost, ProtocolError
from hvaqemu.qemu.race import race
from hvaqemu.reclaim_config import ReclaimConfig

# qemu.qmp logs every lost connection as an error; without a handler that would reach the terminal.
logging.getLogger("qemu.qmp").addHandler(logging.NullHandler())

#: Called in the event loop with each event's name and data.
OnEvent = Callable[[str, dict[str, Any]], None]

#: Seconds for what the host agent answers by itself; its own deadlines on VMs are shorter.
_QUICK = 60.0
#: Seconds for what takes as long as it takes, and reports progress meanwhile.
_LONG = 7200.0


class AgentFailed(RuntimeError):
    """The host agent met a bug of its own; the message is the exception it met."""


class NotServed(PeerLost):
    """There is no host agent at the socket."""


class ControlClient:
    """A connection to a host agent. Every call raises the errors the host agent raised, :class:`PeerLost` when it is
    gone, and :class:`AgentFailed` when it met a bug."""

    def __init__(self, client: QMPClient, listener: _Listener) -> None:
        self._client = client
        self._listener = listener

    @classmethod
    async def connect(cls, path: Path, timeout: float) -> Self:
        """Connect to the host agent at ``path``.

        :raise NotServed: nobody listens there.
        :raise PeerLost: it hung up before it greeted us.
        :raise DeadlineExceeded: it did not greet us in time.
        """
        client = QMPClient("hvaqemu")
        listener = _Listener()
        client.events.event_filter = lambda _event: False
        client.register_listener(listener)
        try:
            await race(client.connect(str(path)), timeout, "the host agent's greeting")
        except ConnectError as error:
            if isinstance(error.exc, FileNotFoundError | ConnectionRefusedError):
                raise NotServed(f"{path}: no host agent runs") from error
            raise PeerLost(f"{path}: {error.exc or 'the host agent hung up'}") from error
        return cls(client, listener)

    async def close(self) -> None:
        """Hang up; a command in progress is cancelled."""
        if self._client.runstate is not Runstate.IDLE:
            with suppress(OSError, EOFError, QMPError, TimeoutError):
                async with asyncio.timeout(5.0):
                    await self._client.disconnect()

    async def execute(
        self,
        command: str,
        arguments: Mapping[str, object] | None = None,
        *,
        timeout: float = _QUICK,
        on_event: OnEvent | None = None,
    ) -> Any:
        """What the host agent returns. ``on_event`` gets all events, also of others, meanwhile."""
        self._listener.on_event = on_event
        try:
            return await race(self._client.execute(command, arguments or {}), timeout, f"the host agent's {command}")
        except ExecuteError as error:
            raise _raised(error) from error
        except ExecInterruptedError as error:
            raise PeerLost(f"{command}: the host agent ended meanwhile", "its log is agent.log") from error
        except (QMPError, StateError) as error:
            # Its words are about the library's own states.
            raise PeerLost(f"{command}: the connection to the host agent is lost") from error
        finally:
            self._listener.on_event = None

    async def vms(self) -> list[VmStatus]:
        """All VMs, by name."""
        return [VmStatus.model_validate(status) for status in await self.execute("query-vms")]

    async def up(self, config: VmConfig, progress: Callable[[str], None]) -> VmStatus:
        """Start a VM; its paths must be absolute."""

        def on_event(event: str, data: dict[str, Any]) -> None:
            if event == "VM_PROGRESS" and data.get("name") == config.name:
                progress(str(data.get("text")))

        # The host agent has a deadline for each part; images take as long as a network takes.
        arguments = {"config": config.model_dump(mode="json")}
        return VmStatus.model_validate(await self.execute("vm-up", arguments, timeout=_LONG, on_event=on_event))

    async def down(self, name: str, keep_disks: bool | None = None) -> str:
        """Stop a VM; how it ended. Its root disk is kept if asked for, or (None) if it was to be kept."""
        arguments = {"name": name, "keep_disks": keep_disks}
        return str((await self.execute("vm-down", arguments, timeout=180.0))["how"])

    async def status(self, name: str) -> VmStatus:
        """A VM's status."""
        return VmStatus.model_validate(await self.execute("vm-status", {"name": name}))

    async def report(self, name: str) -> VmReport:
        """All that is known of a VM, since its host agent has it."""
        return VmReport.model_validate(await self.execute("vm-report", {"name": name}))

    async def console(self, name: str) -> Path:
        """The file that a VM's console is logged to."""
        return Path((await self.execute("vm-console", {"name": name}))["path"])

    async def reclaim(
        self, name: str, states: Sequence[str], epochs: int | None, on_epoch: Callable[[dict[str, Any]], None]
    ) -> ReclaimResult:
        """Run epochs."""

        def on_event(event: str, data: dict[str, Any]) -> None:
            if event == "EPOCH" and data.get("name") == name:
                on_epoch(data["stats"])

        arguments = {"name": name, "states": list(states), "epochs": epochs}
        result = await self.execute("vm-reclaim", arguments, timeout=_LONG, on_event=on_event)
        return ReclaimResult.model_validate(result)

    async def reload(self) -> None:
        """Have the fleet file read again."""
        await self.execute("fleet-reload")

    async def set(self, name: str, changes: Sequence[str]) -> ReclaimConfig:
        """Change how a VM's memory is reclaimed; all of it, as it is then."""
        done = await self.execute("vm-set", {"name": name, "changes": list(changes)})
        return ReclaimConfig.model_validate(done)

    async def freeze(self, name: str, disk: str | None, on_event: OnEvent) -> list[FrozenDisk]:
        """Freeze a disk, or all; returns once what was frozen is a layer."""
        arguments = {"name": name, "disk": disk}
        done = await self.execute("vm-freeze", arguments, timeout=_LONG, on_event=_of_vm(name, on_event))
        return [FrozenDisk.model_validate(each) for each in done["disks"]]

    async def merge(self, name: str, disk: str | None, on_event: OnEvent) -> list[str]:
        """Merge the frozen files of a disk, or of each; files that went."""
        arguments = {"name": name, "disk": disk}
        done = await self.execute("vm-merge", arguments, timeout=_LONG, on_event=_of_vm(name, on_event))
        return [str(path) for path in done["merged"]]

    async def restore(self, name: str) -> int:
        """Make every page resident; how many were not."""
        return int((await self.execute("vm-restore", {"name": name}, timeout=_LONG))["pages"])

    async def resume(self, name: str) -> int:
        """Try the held faults again; pages that are still held."""
        return int((await self.execute("vm-resume", {"name": name}))["held"])

    async def qmp(self, name: str, command: str, arguments: Mapping[str, Any], timeout: float) -> Any:
        """What QEMU returns to a QMP command."""
        given = {"name": name, "command": command, "arguments": dict(arguments), "timeout": timeout}
        # The host agent's own deadlines come first: for an epoch under way, for QEMU, and for a look at it afterwards.
        return (await self.execute("vm-qmp", given, timeout=timeout + 2 * _QUICK + 60.0))["return"]

    async def run(self, name: str, argv: Sequence[str], timeout: float, stdin: bytes = b"") -> ExecResult:
        """Run a command in the guest."""
        arguments = {
            "name": name,
            "argv": list(argv),
            "timeout": timeout,
            "stdin": base64.b64encode(stdin).decode(),
        }
        # The host agent's own deadline comes first.
        result = await self.execute("vm-exec", arguments, timeout=timeout + _QUICK)
        return ExecResult.model_validate(result)

    async def quit(self) -> None:
        """End the host agent; the VMs go on."""
        await self.execute("quit")


def _of_vm(name: str, on_event: OnEvent) -> OnEvent:
    """Only what is said of one VM."""

    def of_it(event: str, data: dict[str, Any]) -> None:
        if data.get("name") == name:
            on_event(event, data)

    return of_it


class _Listener(EventListener):
    """Hands events on at once. The library's own listeners keep every event for ever."""

    def __init__(self) -> None:
        super().__init__()
        self.on_event: OnEvent | None = None

    async def put(self, event: Message) -> None:
        if self.on_event is not None:
            data = event.get("data", {})
            self.on_event(str(event.get("event")), data if isinstance(data, dict) else {})


def _raised(error: ExecuteError) -> HvaError | AgentFailed:
    if error.error_class == wire.INTERNAL_ERROR:
        return AgentFailed(str(error))
    if error.error_class in (wire.COMMAND_NOT_FOUND, wire.GENERIC_ERROR):
        return ProtocolError(str(error), "is the host agent of another version? `hvaqemu agent --stop` ends it")
    details = error.received["error"]
    hint = details.get("hint", "") if isinstance(details, dict) else ""
    return wire.error_from_wire(error.error_class, str(error), str(hint))
