"""What commands of the control socket return, where that is no record of a VM (:mod:`hva_host.agent.model`)."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from hva_host.agent.model import FrozenDisk, Record


class CommandName(Record):
    """A command."""

    name: str


class VersionNumbers(Record):
    """The parts of a version."""

    major: int
    minor: int
    micro: int


class Version(Record):
    """A version, in the shape that clients of QMP expect QEMU's in."""

    #: hvaqemu's own.
    qemu: VersionNumbers
    package: str


class Ended(Record):
    """How a VM ended."""

    how: str


class ConsoleLog(Record):
    """The file that a VM's console is logged to. What is in it is the guest's."""

    path: str


class FrozenDisks(Record):
    """Disks that were frozen at one moment."""

    disks: list[FrozenDisk]


class MergedFiles(Record):
    """What a merge came to."""

    #: Files that went.
    merged: list[str]


class RestoredPages(Record):
    """What restoring came to."""

    #: How many were made resident.
    pages: int


class PagesStillHeld(Record):
    """What resuming came to."""

    #: How many are still held.
    held: int


class GuestMemory(Record):
    """What the balloon leaves a guest."""

    bytes: int


class QmpReturn(Record):
    """What QEMU said."""

    #: What QEMU returned.
    returned: Any = Field(serialization_alias="return")


class Nothing(Record):
    """An empty object."""
