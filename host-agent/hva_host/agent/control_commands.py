"""What the control socket can be asked to do: one table of commands with typed arguments."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from pydantic import BaseModel, ValidationError

from hva_host.agent.control_arguments import (
    Arguments,
    Balloon,
    Disk,
    Down,
    Exec,
    Named,
    Qmp,
    Reclaim,
    Set,
    Up,
)
from hva_host.agent.control_returns import (
    CommandName,
    ConsoleLog,
    Ended,
    FrozenDisks,
    GuestMemory,
    MergedFiles,
    Nothing,
    PagesStillHeld,
    QmpReturn,
    RestoredPages,
    Version,
)
from hva_host.agent.control_wire import version
from hva_host.agent.history import VmReport
from hva_host.agent.model import EpochStats, ExecResult, FrozenDisk, Measure, ReclaimResult, VmStatus
from hvaqemu.config import VmConfig
from hvaqemu.errors import ConfigError
from hvaqemu.reclaim_config import ReclaimConfig, ReclaimState, changed

#: Sends an event to all clients: its name and data.
Emit = Callable[[str, dict[str, Any]], None]


class ControlledVm(Protocol):
    """What commands need of a VM."""

    @property
    def name(self) -> str: ...
    @property
    def config(self) -> VmConfig: ...
    @property
    def console_log(self) -> Path: ...
    async def status(self) -> VmStatus: ...
    async def measure(self) -> Measure: ...
    async def report(self) -> VmReport: ...
    async def reclaim(
        self,
        states: Sequence[ReclaimState],
        *,
        epochs: int | None = None,
        on_epoch: Callable[[EpochStats], None] | None = None,
    ) -> ReclaimResult: ...
    async def freeze(self, disk: str | None) -> list[FrozenDisk]: ...
    async def merge(self, disk: str | None) -> list[str]: ...
    async def restore(self) -> int: ...
    async def resume(self) -> int: ...
    async def execute(
        self, argv: Sequence[str], *, timeout: float, stdin: bytes = b"", limit: int = 1 << 20
    ) -> ExecResult: ...
    async def balloon(self, size: int, timeout: float) -> int: ...
    async def monitor(self, command: str, arguments: Mapping[str, object], timeout: float) -> object: ...


Machine = TypeVar("Machine", bound=ControlledVm, covariant=True)


class ControlledFleet(Protocol[Machine]):
    """What commands need of the fleet."""

    async def up(self, config: VmConfig, progress: Callable[[str], None]) -> Machine: ...
    async def down(self, name: str, keep_disks: bool | None = None) -> str: ...
    def set_reclaim(self, name: str, reclaim: ReclaimConfig) -> None: ...
    def get(self, name: str) -> Machine: ...
    def vms(self) -> Sequence[Machine]: ...


#: pydantic's kinds of error in our words.
_WORDS = {"extra_forbidden": "there is no such argument", "missing": "is missing"}


@dataclass(frozen=True)
class Command:
    """One command. ``detached``: it goes on to its end even if who asked for it hangs up."""

    name: str
    arguments: type[Arguments]
    run: Callable[[Any], Awaitable[BaseModel | Sequence[BaseModel]]]
    detached: bool = False

    def parse(self, arguments: object) -> Arguments:
        """The typed arguments.

        :raise ConfigError: one is unknown, missing or wrong.
        """
        if not isinstance(arguments, Mapping):
            raise ConfigError(f"{self.name}: arguments must be an object")
        try:
            return self.arguments.model_validate(dict(arguments))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(map(str, first["loc"]))
            what = _WORDS.get(first["type"], first["msg"].removeprefix("Value error, "))
            raise ConfigError(f"{self.name}: argument {where}: {what}") from error


class CommandTable:
    """The commands on a fleet."""

    def __init__(
        self, fleet: ControlledFleet[ControlledVm], emit: Emit, stop: Callable[[], None], reload: Callable[[], None]
    ) -> None:
        """
        :param stop: asks the process to end, leaving the VMs running.
        :param reload: reads the fleet file again; raises HvaError where that is wrong.
        """
        self._fleet = fleet
        self._emit = emit
        self._stop = stop
        self._reload = reload
        self._commands = {
            command.name: command
            for command in (
                Command("query-commands", Arguments, self._query_commands),
                Command("query-version", Arguments, self._query_version),
                Command("query-vms", Arguments, self._query_vms),
                Command("vm-up", Up, self._up),
                Command("vm-down", Down, self._down, detached=True),
                Command("vm-status", Named, self._status),
                Command("vm-measure", Named, self._measure),
                Command("vm-report", Named, self._report),
                Command("vm-console", Named, self._console),
                Command("vm-reclaim", Reclaim, self._reclaim),
                Command("vm-set", Set, self._set),
                # Begun is ended: half of a freeze is of no use to anybody.
                Command("vm-freeze", Disk, self._freeze, detached=True),
                Command("vm-merge", Disk, self._merge),
                Command("vm-restore", Named, self._restore),
                Command("vm-resume", Named, self._resume, detached=True),
                Command("vm-exec", Exec, self._exec),
                Command("vm-balloon", Balloon, self._balloon),
                # QEMU goes on with what it has begun, so whoever keeps epochs from running beside it does too.
                Command("vm-qmp", Qmp, self._qmp, detached=True),
                Command("fleet-reload", Arguments, self._reload_fleet),
                Command("quit", Arguments, self._quit),
            )
        }

    def get(self, name: object) -> Command | None:
        """The command of that name, if there is one."""
        return self._commands.get(name) if isinstance(name, str) else None

    @property
    def all(self) -> Sequence[Command]:
        """Every command, in the order of their descriptions."""
        return tuple(self._commands.values())

    # The docstrings are what docs/control.md says of the commands.

    async def _query_commands(self, _: Arguments) -> list[CommandName]:
        """The commands there are."""
        return [CommandName(name=name) for name in ("qmp_capabilities", *self._commands)]

    async def _query_version(self, _: Arguments) -> Version:
        """The host agent's version."""
        return Version.model_validate(version())

    async def _query_vms(self, _: Arguments) -> list[VmStatus]:
        """All VMs, by name."""
        statuses = await asyncio.gather(*(vm.status() for vm in self._fleet.vms()))
        return sorted(statuses, key=lambda status: status.name)

    async def _up(self, arguments: Up) -> VmStatus:
        """Start a VM; returns once the agent in its guest is connected. Events `VM_PROGRESS` tell how far it is.
        Hanging up takes the VM back."""
        name = arguments.config.name
        vm = await self._fleet.up(
            arguments.config, lambda text: self._emit("VM_PROGRESS", {"name": name, "text": text})
        )
        return await vm.status()

    async def _down(self, arguments: Down) -> Ended:
        """End a VM: ask the guest, then QEMU, then kill."""
        return Ended(how=await self._fleet.down(arguments.name, arguments.keep_disks))

    async def _status(self, arguments: Named) -> VmStatus:
        """All about one VM, as `hvaqemu status NAME --json` prints it."""
        return await self._fleet.get(arguments.name).status()

    async def _measure(self, arguments: Named) -> Measure:
        """The memory of a VM, and what it costs."""
        return await self._fleet.get(arguments.name).measure()

    async def _report(self, arguments: Named) -> VmReport:
        """What the host agent remembers of a VM, for a report."""
        return await self._fleet.get(arguments.name).report()

    async def _console(self, arguments: Named) -> ConsoleLog:
        """Where a VM's console is logged."""
        return ConsoleLog(path=str(self._fleet.get(arguments.name).console_log))

    async def _reclaim(self, arguments: Reclaim) -> ReclaimResult:
        """Give unneeded memory back to the host. Each epoch is an event `EPOCH`. Hanging up ends it, after its
        protection is taken back."""
        return await self._fleet.get(arguments.name).reclaim(arguments.states, epochs=arguments.epochs)

    async def _set(self, arguments: Set) -> ReclaimConfig:
        """Change how a VM's memory is reclaimed, without touching its guest."""
        reclaim = changed(self._fleet.get(arguments.name).config.reclaim, arguments.changes)
        if arguments.changes:
            self._fleet.set_reclaim(arguments.name, reclaim)
        return reclaim

    async def _freeze(self, arguments: Disk) -> FrozenDisks:
        """Make a layer of what the guest wrote; returns once it is indexed and in use. Events `LAYER_INDEXING` tell how
        far it is."""
        return FrozenDisks(disks=await self._fleet.get(arguments.name).freeze(arguments.disk))

    async def _merge(self, arguments: Disk) -> MergedFiles:
        """Merge the frozen files of a disk, or of each, into the lowest. Events `MERGING` tell how far it is. Hanging
        up takes it back."""
        return MergedFiles(merged=await self._fleet.get(arguments.name).merge(arguments.disk))

    async def _restore(self, arguments: Named) -> RestoredPages:
        """Make every page resident."""
        return RestoredPages(pages=await self._fleet.get(arguments.name).restore())

    async def _resume(self, arguments: Named) -> PagesStillHeld:
        """Try held pages again, and let the guest go on once none is held."""
        return PagesStillHeld(held=await self._fleet.get(arguments.name).resume())

    async def _exec(self, arguments: Exec) -> ExecResult:
        """Run a command in the guest, whose file must have `allow_exec: true`. Hanging up kills it."""
        vm = self._fleet.get(arguments.name)
        return await vm.execute(arguments.argv, timeout=arguments.timeout, stdin=arguments.stdin)

    async def _balloon(self, arguments: Balloon) -> GuestMemory:
        """Have the guest live with so much memory."""
        vm = self._fleet.get(arguments.name)
        return GuestMemory(bytes=await vm.balloon(arguments.size, arguments.timeout))

    async def _qmp(self, arguments: Qmp) -> QmpReturn:
        """Pass a command on to QEMU's monitor, past a guard."""
        vm = self._fleet.get(arguments.name)
        return QmpReturn(returned=await vm.monitor(arguments.command, arguments.arguments, arguments.timeout))

    async def _reload_fleet(self, _: Arguments) -> Nothing:
        """Read the fleet file again, as SIGHUP does."""
        self._reload()
        return Nothing()

    async def _quit(self, _: Arguments) -> Nothing:
        """End the host agent; VMs go on."""
        self._stop()
        return Nothing()


def to_wire(returned: object) -> Any:
    """What a command returned, as it is sent."""
    if isinstance(returned, list):
        return [to_wire(each) for each in returned]
    assert isinstance(returned, BaseModel)
    return returned.model_dump(mode="json", by_alias=True)
