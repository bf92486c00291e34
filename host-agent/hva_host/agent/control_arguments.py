"""What commands of the control socket take: typed, and described for docs/control.md."""

from __future__ import annotations

import base64
import binascii
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from hvaqemu.config import VmConfig
from hvaqemu.fields import Count, Flag, Name, Seconds, Size, Text
from hvaqemu.protocol import STDIN_BYTES_MAX
from hvaqemu.reclaim_config import DEFAULT_STATES, ReclaimState


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


class Up(Arguments):
    #: Its paths must be absolute.
    config: VmConfig


class Named(Arguments):
    #: The VM's.
    name: Name


class Reclaim(Named):
    #: What to take.
    states: Annotated[tuple[ReclaimState, ...], Field(min_length=1)] = DEFAULT_STATES
    #: So many; null: until one gains less than 1 %, or 1 MiB.
    epochs: Count | None = None


class Set(Named):
    #: Each ``key=value``, as on a command line; none: nothing is changed.
    changes: tuple[Text, ...] = ()


class Down(Named):
    #: Whether its root disk stays for the next VM of that name; null: if it was to be kept.
    keep_disks: Flag | None = None


class Disk(Named):
    #: `root` or `swap`; null: all, at one moment.
    disk: Text | None = None


class Exec(Named):
    #: The program and its arguments; no shell.
    argv: Annotated[tuple[Annotated[str, BeforeValidator(_argument)], ...], Field(min_length=1)]
    #: Then the command is killed.
    timeout: Seconds = 60.0
    #: Base64 of at most 64 KiB.
    stdin: Annotated[bytes, BeforeValidator(_unbase64), Field(max_length=STDIN_BYTES_MAX)] = b""


class Balloon(Named):
    size: Size
    #: For the guest to get there.
    timeout: Seconds = 60.0


class Qmp(Named):
    command: Text
    #: As QEMU takes them.
    arguments: dict[str, Any] = {}
    timeout: Seconds = 60.0
