"""A root directory under construction: its files, and the owners and modes they shall have in the guest.

Everything here works as an ordinary user too, who can not give files away: what a file shall be is kept beside the
tree, and applied when the file system is made. No link is ever followed out of the tree.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from hva_images.debs import Member
from hvaqemu.errors import ConfigError

_LINKS_MAX = 40


@dataclass(frozen=True)
class Attributes:
    """Permission bits and numeric owner."""

    mode: int
    uid: int = 0
    gid: int = 0


class Tree:
    """The files below ``root``. Paths are the guest's own, absolute, as text."""

    def __init__(self, root: Path) -> None:
        self.root = root
        #: What was said of a path, by its real path; whatever is missing here is root's, with the mode it has.
        self.attributes: dict[str, Attributes] = {}

    def real(self, path: str, *, follow: bool = False) -> str:
        """``path`` without links in its directories (``/bin/sh`` is ``/usr/bin/sh``).

        :param follow: without a link as its last part, too.
        :raise ConfigError: its links lead in a circle.
        """
        done: list[str] = []
        todo = [part for part in path.split("/") if part not in ("", ".")]
        links = 0
        while todo:
            part = todo.pop(0)
            if part == "..":
                done = done[:-1]
                continue
            here = self.root.joinpath(*done, part)
            if (todo or follow) and here.is_symlink():
                links += 1
                if links > _LINKS_MAX:
                    raise ConfigError(f"{path}: leads in a circle")
                target = str(here.readlink())
                if target.startswith("/"):
                    done = []
                todo = [each for each in target.split("/") if each not in ("", ".")] + todo
                continue
            done.append(part)
        return "/" + "/".join(done)

    def host(self, path: str) -> Path:
        """Where ``path`` is on the host."""
        return self.root / self.real(path).lstrip("/")

    def exists(self, path: str) -> bool:
        return os.path.lexists(self.host(path))

    def read(self, path: str) -> bytes:
        return self.host(self.real(path, follow=True)).read_bytes()

    def directory(self, path: str, mode: int = 0o755, gid: int = 0) -> None:
        """Make directory ``path``, its parents with the usual mode.

        :raise ConfigError: something else is there.
        """
        path = self.real(path, follow=True)
        where = self.host(path)
        if not where.is_dir():
            self._parent(path)
            if os.path.lexists(where):
                raise ConfigError(f"{path}: is not a directory in the image")
            where.mkdir(0o755)
        self._note(path, Attributes(mode, 0, gid))

    def write(self, path: str, content: bytes | str, mode: int = 0o644, gid: int = 0) -> None:
        """Make file ``path``, in place of one that is there."""
        where = self._fresh(path)
        where.write_bytes(content if isinstance(content, bytes) else content.encode())
        self._note(path, Attributes(mode, 0, gid))

    def default(self, path: str, content: bytes | str, mode: int = 0o644, gid: int = 0) -> None:
        """Make file ``path`` unless it is there."""
        if not self.exists(path):
            self.write(path, content, mode, gid)

    def link(self, path: str, target: str) -> None:
        """Make symbolic link ``path``, in place of a file or an empty directory that is there."""
        where = self.host(path)
        if where.is_dir() and not where.is_symlink():
            where.rmdir()
        self._fresh(path).symlink_to(target)

    def install(self, path: str, source: Path, mode: int) -> None:
        """Copy the host's file ``source`` to ``path``."""
        where = self._fresh(path)
        shutil.copyfile(source, where)
        self._note(path, Attributes(mode))

    def remove(self, path: str) -> None:
        """Remove file ``path``, or the directory if it is empty; nothing if it is not there."""
        where = self.host(path)
        self.attributes.pop(self.real(path), None)
        if where.is_dir() and not where.is_symlink():
            if not any(where.iterdir()):
                where.rmdir()
        else:
            where.unlink(missing_ok=True)

    def claim(self, members: Iterable[Member]) -> None:
        """Note owners and modes of files that a package brought."""
        for member in members:
            if not member.is_link and member.path != "/":
                self.attributes[self.real(member.path)] = Attributes(member.mode, member.uid, member.gid)

    def sweep(self, known: set[str]) -> None:
        """Remove all files but those whose real paths are ``known``, and directories that are left empty by that."""
        for path in list(self.walk(bottom_up=True)):
            if path not in known:
                self.remove(path)

    def walk(self, *, bottom_up: bool = False) -> Iterator[str]:
        """The real paths of all there is, links included, in order; the root itself is left out."""
        for directory, subdirectories, files in os.walk(self.root, topdown=not bottom_up):
            subdirectories.sort()
            prefix = "/" + os.path.relpath(directory, self.root) if directory != str(self.root) else ""
            for name in sorted([*subdirectories, *files]):
                yield f"{prefix}/{name}"

    def bytes_needed(self) -> int:
        """Bytes that the files take in blocks of 4 KiB, without what the file system itself needs."""
        total = 0
        for path in self.walk():
            status = os.lstat(self.root / path.lstrip("/"))
            total += -(-status.st_size // 4096) * 4096 + 256
        return total

    def _fresh(self, path: str) -> Path:
        """Room for a new file at ``path``.

        :raise ConfigError: there is a directory.
        """
        self._parent(path)
        where = self.host(path)
        if where.is_dir() and not where.is_symlink():
            raise ConfigError(f"{path}: is a directory in the image")
        where.unlink(missing_ok=True)
        return where

    def _parent(self, path: str) -> None:
        parent = self.real(path).rpartition("/")[0]
        if parent and not self.host(parent).is_dir():
            self.directory(parent)

    def _note(self, path: str, attributes: Attributes) -> None:
        self.attributes[self.real(path)] = attributes
