"""A disk's chain of files: what is recorded of it, and what QEMU says it is.

Files are named DISK.qcow2, DISK-1.qcow2, DISK-2.qcow2, … in the order in which they were made; a number is never used
twice. The record is written before QEMU is told, and QEMU's own block graph is believed afterwards. Where there is no
QEMU any more to ask, the record still tells a chain that holds every byte:

* a file that was made for a freeze that may not have happened (``pending``) is then an empty one on top of the others,
* files that were being merged still lie above what they were merged into, and say the same.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from hvaqemu.errors import PeerLost, ProtocolError
from hvaqemu.qemu.command import disk_id
from hvaqemu.qemu.qmp import QmpLink

_SUFFIX = ".qcow2"


class Chain(BaseModel):
    """One disk of a VM."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    #: ``root`` or ``swap``.
    disk: str
    #: The raw image below; None: nothing.
    base: Path | None
    #: qcow2 files, bottom first; the last one takes the guest's writes.
    files: tuple[Path, ...]
    #: Bytes of the disk.
    size: int
    #: Made to take the place of the last one.
    pending: Path | None = None
    #: How many files were made to follow the first.
    made: int = 0

    @property
    def active(self) -> Path:
        """What takes the guest's writes."""
        return self.files[-1]

    @property
    def frozen(self) -> tuple[Path, ...]:
        """What does not change any more."""
        return self.files[:-1]

    def next(self) -> Chain:
        """The same with a further file about to be made."""
        number = self.made + 1
        path = self.files[0].with_name(f"{self.disk}-{number}{_SUFFIX}")
        return self.model_copy(update={"made": number, "pending": path})

    def as_found(self, files: tuple[Path, ...]) -> Chain:
        """The same with the files QEMU has."""
        return self.model_copy(update={"files": files, "pending": None})

    def without_qemu(self) -> Chain:
        """What holds every byte of the guest's, once QEMU has ended."""
        pending = self.pending
        joined = pending is not None and pending.exists() and pending not in self.files
        files = (*self.files, pending) if joined and pending is not None else self.files
        return self.as_found(files)


class Merge(BaseModel):
    """A merge under way."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    disk: str
    #: What is written to.
    target: Path
    #: Frozen files above it, bottom first, up to the writable one.
    sources: tuple[Path, ...]


def first_file(folder: Path, disk: str) -> Path:
    """The first file of a new disk."""
    return folder / f"{disk}{_SUFFIX}"


async def files_of(qmp: QmpLink, chain: Chain) -> tuple[Path, ...]:
    """The disk's qcow2 files as QEMU has them open, bottom first.

    :raise HvaError: QEMU went, did not answer, or has no such disk.
    """
    device = disk_id(chain.disk)
    for block in _dicts(await qmp.execute("query-block")):
        if device in str(block.get("qdev")).split("/"):
            inserted = block.get("inserted")
            found = tuple(_paths(inserted.get("image") if isinstance(inserted, dict) else None))
            if not found:
                raise ProtocolError(f"QMP query-block: disk {chain.disk} has no files")
            return found[::-1]
    raise PeerLost(f"QEMU has no disk {chain.disk} any more")


def _paths(image: Any) -> Iterator[Path]:
    while isinstance(image, dict):
        if image.get("format") == "qcow2":
            yield Path(_file_name(str(image.get("filename"))))
        image = image.get("backing-image")


def _file_name(said: str) -> str:
    """What QEMU opens; it writes "json:{…}" where the name alone would not lead to the same node."""
    if not said.startswith("json:"):
        return said
    try:
        return str(json.loads(said[5:])["file"]["filename"])
    except (ValueError, KeyError, TypeError) as error:
        raise ProtocolError("QMP query-block: an image without a file") from error


def _dicts(answer: object) -> list[dict[str, Any]]:
    return [entry for entry in answer if isinstance(entry, dict)] if isinstance(answer, list) else []
