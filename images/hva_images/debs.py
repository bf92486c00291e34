"""Debian binary packages, read without running or unpacking anything: control data and what files they hold."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from hvaqemu.errors import HostError

_AR_MAGIC = b"!<arch>\n"
#: tarfile modes of the compressions that Debian's archive uses.
_MODES = {"": "r|", ".gz": "r|gz", ".bz2": "r|bz2", ".xz": "r|xz"}


@dataclass(frozen=True)
class Member:
    """One file of a package; ``path`` is absolute, as the package has it (``/bin/x`` even where ``/bin`` is a link)."""

    path: str
    mode: int
    uid: int
    gid: int
    mtime: int
    size: int
    is_dir: bool
    is_link: bool


@dataclass(frozen=True)
class Deb:
    """A package as its .deb file describes it; ``control`` keeps the order and text of its fields."""

    path: Path
    control: dict[str, str]
    #: Other members of the control archive, by name: scripts, conffiles, md5sums, triggers, …
    info: dict[str, bytes] = field(repr=False)
    members: tuple[Member, ...] = field(repr=False)

    @property
    def name(self) -> str:
        return self.control["Package"]

    @property
    def version(self) -> str:
        return self.control["Version"]

    @property
    def info_name(self) -> str:
        """How dpkg names its files below ``info/``: with the architecture where several may be installed at once."""
        same = self.control.get("Multi-Arch") == "same"
        return f"{self.name}:{self.control['Architecture']}" if same else self.name

    @property
    def installed_bytes(self) -> int:
        """Bytes that its files and dpkg's own take, in blocks of 4 KiB."""
        return sum(-(-member.size // 4096) * 4096 for member in self.members) + 16 * 4096

    def script(self, name: str) -> str:
        """The maintainer script or other control member ``name`` as text, "" where the package has none."""
        return self.info.get(name, b"").decode(errors="replace")

    def relations(self, field_name: str) -> list[str]:
        """The package names in a field such as Depends, alternatives included."""
        words = self.control.get(field_name, "").replace("|", ",").split(",")
        return [word.split("(")[0].split("[")[0].split(":")[0].strip() for word in words if word.strip()]


def read_deb(path: Path) -> Deb:
    """The package in file ``path``.

    :raise HostError: it is no such file.
    """
    info: dict[str, bytes] = {}
    members: list[Member] = []
    try:
        with path.open("rb") as file:
            for name, section in _sections(file):
                stem, _, compression = name.partition(".tar")
                if stem == "control":
                    with tarfile.open(fileobj=section, mode=_MODES[compression]) as archive:  # type: ignore[call-overload]
                        for entry in archive:
                            content = archive.extractfile(entry)
                            if content is not None:
                                info[entry.name.removeprefix("./")] = content.read()
                elif stem == "data":
                    with tarfile.open(fileobj=section, mode=_MODES[compression]) as archive:  # type: ignore[call-overload]
                        members.extend(_member(entry) for entry in archive)
        control = parse_control(info.pop("control").decode())
    except (OSError, EOFError, KeyError, ValueError, tarfile.TarError) as error:
        raise HostError(f"{path.name}: not a package that can be read: {error}") from error
    return Deb(path, control, info, tuple(members))


def parse_control(text: str) -> dict[str, str]:
    """The fields of one stanza in their order; a continued value keeps its line breaks."""
    fields: dict[str, str] = {}
    name = ""
    for line in text.splitlines():
        if line[:1].isspace() and name:
            fields[name] += "\n" + line
        elif ":" in line:
            name, _, value = line.partition(":")
            fields[name] = value.strip()
    return fields


def _member(entry: tarfile.TarInfo) -> Member:
    path = "/" + entry.name.removeprefix("./").removeprefix(".").strip("/")
    return Member(path, entry.mode, entry.uid, entry.gid, int(entry.mtime), entry.size, entry.isdir(), entry.issym())


class _Section(io.RawIOBase):
    """A part of a file, read in order."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        self._file = file
        self._left = size

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        wanted = self._left if size < 0 else min(size, self._left)
        data = self._file.read(wanted)
        self._left -= len(data)
        return data


def _sections(file: IO[bytes]) -> Iterator[tuple[str, IO[bytes]]]:
    """Name and content of each member of an ar(5) archive."""
    if file.read(len(_AR_MAGIC)) != _AR_MAGIC:
        raise ValueError("no ar archive")
    while header := file.read(60):
        if len(header) != 60 or header[58:] != b"`\n":
            raise ValueError("broken ar archive")
        size = int(header[48:58])
        start = file.tell()
        yield header[:16].decode().strip().rstrip("/"), _Section(file, size)  # type: ignore[misc]
        file.seek(start + size + size % 2, os.SEEK_SET)
