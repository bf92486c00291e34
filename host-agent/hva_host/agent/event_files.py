"""The event logs of VMs as files: where they are, how much they hold, and reading them while they are written.

``events/NAME.jsonl`` in the state directory, so that it outlives the VM; older lines are in ``NAME.jsonl.1`` and so on,
``.1`` the newest of them. A line is a JSON object: ``time`` (RFC 3339, UTC), ``event``, ``data``, and ``untold`` where
so many like it came since the line before and were left out.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple, Self

from hvaqemu.errors import ConfigError, HostError
from hvaqemu.paths import state_dir

#: Bytes of one file, and how many older ones a VM has beside it.
FILE_MAX = 1 << 20
OLDER = 3
#: Bytes of all VMs' logs; beyond it those written to least lately are deleted.
TOTAL_MAX = 64 << 20
_SUFFIX = ".jsonl"
_NAMES_SHOWN = 20
_TAIL = 1 << 14


class LoggedEvent(NamedTuple):
    """One line of an event log; text in ``data`` may be a guest's."""

    time: datetime
    event: str
    data: dict[str, Any]
    #: Events like it, since the one before, that were left out.
    untold: int
    #: The line itself.
    raw: bytes


def events_folder() -> Path:
    """Where the logs are; need not exist."""
    return state_dir() / "events"


def log_file(folder: Path, name: str) -> Path:
    """The file that a VM's newest events are in."""
    return folder / f"{name}{_SUFFIX}"


def older_files(path: Path) -> list[Path]:
    """Where what was in a log before is, newest first; they need not exist."""
    return [path.with_name(f"{path.name}.{number}") for number in range(1, OLDER + 1)]


def format_line(time: datetime, event: str, data: dict[str, Any], untold: int) -> bytes:
    """A line of a log: ASCII, so that no text of a guest acts on a terminal."""
    line: dict[str, Any] = {"time": format_time(time), "event": event, "data": data}
    if untold:
        line["untold"] = untold
    return json.dumps(line, separators=(",", ":"), default=str).replace("\x7f", "\\u007f").encode() + b"\n"


def format_time(time: datetime) -> str:
    """A moment by RFC 3339, UTC, to the millisecond."""
    return time.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def parse_line(raw: bytes) -> LoggedEvent | None:
    """What a line of a log says; None for one that its writer did not come to the end of."""
    try:
        line = json.loads(raw)
        time = datetime.fromisoformat(line["time"])
        event, data, untold = line["event"], line["data"], line.get("untold", 0)
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    fits = isinstance(event, str) and isinstance(data, dict) and isinstance(untold, int) and time.tzinfo is not None
    return LoggedEvent(time, event, data, untold, raw) if fits else None


def names(folder: Path) -> list[str]:
    """VMs that have a log."""
    return sorted(path.name.removesuffix(_SUFFIX) for path in folder.glob(f"*{_SUFFIX}"))


def last_events(folder: Path, name: str, count: int) -> list[LoggedEvent]:
    """The newest events of a VM, as far as they are among the last :data:`_TAIL` bytes of its log; oldest first."""
    try:
        with log_file(folder, name).open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL))
            lines = file.read(_TAIL).split(b"\n")
    except OSError:
        return []
    return [event for line in lines if (event := parse_line(line)) is not None][-count:]


def prune(folder: Path, most: int = TOTAL_MAX) -> None:
    """Delete files written to least lately until all logs together have at most ``most`` bytes."""
    found = []
    for path in folder.iterdir():
        # Rotated or deleted meanwhile.
        with suppress(OSError):
            status = path.stat()
            found.append((status.st_mtime, status.st_size, path))
    total = sum(size for _, size, _ in found)
    for _, size, path in sorted(found):
        if total <= most:
            break
        path.unlink(missing_ok=True)
        total -= size


class EventReader:
    """Reads a VM's log, from its oldest line on, however often it is rotated meanwhile; a context."""

    def __init__(self, folder: Path, name: str) -> None:
        """
        :raise ConfigError: there is no log of that VM.
        :raise HostError: it can not be read.
        """
        self._path = log_file(folder, name)
        self._file: BinaryIO | None = None
        self._newer = self._look()
        self._rest = b""
        if not self._newer:
            known = ", ".join(names(folder)[:_NAMES_SHOWN]) or "none"
            raise ConfigError(f"VM {name}: no events of it are recorded", f"there are events of: {known}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        for file in (self._file, *self._newer):
            if file is not None:
                file.close()

    def read(self) -> Iterator[LoggedEvent]:
        """The events that have come since the last call; at the first, all there are.

        :raise HostError: the log can not be read.
        """
        try:
            # First: what is in a newer file was written when the present one was complete.
            self._newer = self._newer or self._look()
            if self._file is not None:
                yield from self._events(self._file)
            while self._newer:
                if self._file is not None:
                    self._file.close()
                self._file, self._rest = self._newer.pop(0), b""
                yield from self._events(self._file)
        except OSError as error:
            raise HostError(f"{self._path}: {error.strerror}") from error

    def _look(self) -> list[BinaryIO]:
        """The files that are newer than the present one, oldest first.

        :raise HostError: one can not be opened.
        """
        present = None if self._file is None else os.fstat(self._file.fileno())
        found: dict[tuple[int, int], BinaryIO] = {}
        # Newest first: one that is rotated meanwhile is met twice, and not missed.
        for path in (self._path, *older_files(self._path)):
            try:
                file = path.open("rb")
            except FileNotFoundError:
                continue
            except OSError as error:
                raise HostError(f"{path}: {error.strerror}") from error
            status = os.fstat(file.fileno())
            known = present is not None and os.path.samestat(status, present)
            if known or (status.st_dev, status.st_ino) in found:
                file.close()
            else:
                found[status.st_dev, status.st_ino] = file
            if known:
                break
        return list(reversed(found.values()))

    def _events(self, file: BinaryIO) -> Iterator[LoggedEvent]:
        while data := file.read(1 << 16):
            *lines, self._rest = (self._rest + data).split(b"\n")
            for line in lines:
                if (event := parse_line(line)) is not None:
                    yield event
