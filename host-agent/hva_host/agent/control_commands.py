"""What the control socket can be asked to do: one table of commands with typed arguments."""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Protocol, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from hva_host.agent.control_wire import version
from hva_host.agent.model import EpochStats, ExecResult, FrozenDisk, Measure, ReclaimResult, VmStatus
from hvaqemu.config import VmConfig
from hvaqemu.errors import ConfigError
from hvaqemu.fields import Count, Flag, Name, Seconds, Size, Text
from hvaqemu.protocol import STDIN_BYTES_MAX
from hvaqemu.scenario_config import DEFAULT_STATES, ReclaimState

#: Sends an event to all clients: its name and data.
Emit = Callable[[str, dict[str, Any]], None]


class ControlledVm(Protocol):
    """What commands need of a VM."""

    @property
    def name(self) -> str: ...
    @property
    def console_log(self) -> Path: ...
    async def status(self) -> VmStatus: ...
    async def measure(self) -> Measure: ...
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
    def get(self, name: str) -> Machine: ...
    def vms(self) -> Sequence[Machine]: ...


def _unbase64(value: object) -> object:
    if not isinstance(value, str):
        raise ValueError("must be base64 text")
    try:
        return base64.b64decode(value, validate=True)
    except binascii.Error as error:
        raise ValueError("must be base64 text") from error


def _argument(value: str) -> str:
    if "\0" in value:
        raise ValueError("must not contain a NUL")
    return value


class Arguments(BaseModel):
    """No arguments; commands that take some derive from this."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class _Up(Arguments):
    config: VmConfig


class _Named(Arguments):
    name: Name


class _Reclaim(_Named):
    states: Annotated[tuple[ReclaimState, ...], Field(min_length=1)] = DEFAULT_STATES
    epochs: Count | None = None


class _Down(_Named):
    keep_disks: Flag | None = None


class _Disk(_Named):
    disk: Text | None = None


class _Exec(_Named):
    argv: Annotated[tuple[Annotated[str, BeforeValidator(_argument)], ...], Field(min_length=1)]
    timeout: Seconds = 60.0
    stdin: Annotated[bytes, BeforeValidator(_unbase64), Field(max_length=STDIN_BYTES_MAX)] = b""


class _Balloon(_Named):
    size: Size
    timeout: Seconds = 60.0


class _Qmp(_Named):
    command: Text
    arguments: dict[str, Any] = {}
    timeout: Seconds = 60.0


#: pydantic's kinds of error in our words.
_WORDS = {"extra_forbidden": "there is no such argument", "missing": "is missing"}


@dataclass(frozen=True)
class Command:
    """One command. ``detached``: it goes on to its end even if who asked for it hangs up."""

    name: str
    arguments: type[Arguments]
    run: Callable[[Any], Awaitable[object]]
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

    def __init__(self, fleet: ControlledFleet[ControlledVm], emit: Emit, stop: Callable[[], None]) -> None:
        """:param stop: asks the process to end, leaving the VMs running."""
        self._fleet = fleet
        self._emit = emit
        self._stop = stop
        self._commands = {
            command.name: command
            for command in (
                Command("query-commands", Arguments, self._query_commands),
                Command("query-version", Arguments, self._query_version),
                Command("query-vms", Arguments, self._query_vms),
                Command("vm-up", _Up, self._up),
                Command("vm-down", _Down, self._down, detached=True),
                Command("vm-status", _Named, self._status),
                Command("vm-measure", _Named, self._measure),
                Command("vm-console", _Named, self._console),
                Command("vm-reclaim", _Reclaim, self._reclaim),
                # Begun is ended: half of a freeze is of no use to anybody.
                Command("vm-freeze", _Disk, self._freeze, detached=True),
                Command("vm-merge", _Disk, self._merge),
                Command("vm-restore", _Named, self._restore),
                Command("vm-resume", _Named, self._resume, detached=True),
                Command("vm-exec", _Exec, self._exec),
                Command("vm-balloon", _Balloon, self._balloon),
                # QEMU goes on with what it has begun, so whoever keeps epochs from running beside it does too.
                Command("vm-qmp", _Qmp, self._qmp, detached=True),
                Command("quit", Arguments, self._quit),
            )
        }

    def get(self, name: object) -> Command | None:
        """The command of that name, if there is one."""
        return self._commands.get(name) if isinstance(name, str) else None

    async def _query_commands(self, _: Arguments) -> object:
        return [{"name": name} for name in ("qmp_capabilities", *self._commands)]

    async def _query_version(self, _: Arguments) -> object:
        return version()

    async def _query_vms(self, _: Arguments) -> object:
        statuses = await asyncio.gather(*(vm.status() for vm in self._fleet.vms()))
        return [_json(status) for status in sorted(statuses, key=lambda status: status.name)]

    async def _up(self, arguments: _Up) -> object:
        name = arguments.config.name
        vm = await self._fleet.up(
            arguments.config, lambda text: self._emit("VM_PROGRESS", {"name": name, "text": text})
        )
        return _json(await vm.status())

    async def _down(self, arguments: _Down) -> object:
        return {"how": await self._fleet.down(arguments.name, arguments.keep_disks)}

    async def _status(self, arguments: _Named) -> object:
        return _json(await self._fleet.get(arguments.name).status())

    async def _measure(self, arguments: _Named) -> object:
        return _json(await self._fleet.get(arguments.name).measure())

    async def _console(self, arguments: _Named) -> object:
        return {"path": str(self._fleet.get(arguments.name).console_log)}

    async def _reclaim(self, arguments: _Reclaim) -> object:
        # Each epoch is an event of the VM's own.
        return _json(await self._fleet.get(arguments.name).reclaim(arguments.states, epochs=arguments.epochs))

    async def _freeze(self, arguments: _Disk) -> object:
        return {"disks": [_json(disk) for disk in await self._fleet.get(arguments.name).freeze(arguments.disk)]}

    async def _merge(self, arguments: _Disk) -> object:
        return {"merged": await self._fleet.get(arguments.name).merge(arguments.disk)}

    async def _restore(self, arguments: _Named) -> object:
        return {"pages": await self._fleet.get(arguments.name).restore()}

    async def _resume(self, arguments: _Named) -> object:
        return {"held": await self._fleet.get(arguments.name).resume()}

    async def _exec(self, arguments: _Exec) -> object:
        vm = self._fleet.get(arguments.name)
        return _json(await vm.execute(arguments.argv, timeout=arguments.timeout, stdin=arguments.stdin))

    async def _balloon(self, arguments: _Balloon) -> object:
        vm = self._fleet.get(arguments.name)
        return {"bytes": await vm.balloon(arguments.size, arguments.timeout)}

    async def _qmp(self, arguments: _Qmp) -> object:
        vm = self._fleet.get(arguments.name)
        return {"return": await vm.monitor(arguments.command, arguments.arguments, arguments.timeout)}

    async def _quit(self, _: Arguments) -> object:
        self._stop()
        return {}


def _json(record: BaseModel) -> Any:
    return record.model_dump(mode="json")
