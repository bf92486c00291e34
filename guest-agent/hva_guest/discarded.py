"""Keeps the list of pages the host has taken, for whoever administers the guest: /run/hva/discarded.

The host sends which pages are not resident, piece by piece; the list takes the place of the one before at once, by a
rename. Its format is in docs/discarded.md.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Iterator
from typing import NamedTuple

from hva_guest.memory import read_uptime_ms
from hvaqemu.errors import ProtocolError
from hvaqemu.pages import Residence
from hvaqemu.protocol import DiscardedEnd, DiscardedKept, DiscardedPiece, unpack_map

FOLDER = "/run/hva"
_NAME = "discarded"
#: Bytes of runs that are listed, some 20,000 of them. What is beyond is in the totals only.
LIST_BYTES_MAX = 512 * 1024
_RUNS = re.compile(b"|".join(b"\\x%02x+" % kind for kind in Residence if kind != Residence.RESIDENT))
_WORDS = {kind: kind.name.lower() for kind in Residence}


class _Run(NamedTuple):
    kind: int
    start: int
    stop: int


class DiscardedList:
    """The list that is being sent, and its file.

    :param folder: made where it is missing.
    """

    def __init__(self, folder: str = FOLDER) -> None:
        self._folder = folder
        self.forget()

    def forget(self) -> None:
        """Drop what has come of a list; the one before stays."""
        self._list = 0
        self._pieces = 0
        self._stop = 0
        self._runs = 0
        self._complete = True
        self._text = bytearray()
        self._last = _Run(Residence.RESIDENT, 0, 0)

    def piece(self, message: DiscardedPiece) -> DiscardedKept:
        """Take a piece; the first one of a list begins it, whatever became of the list before.

        :raise ProtocolError: it does not follow the piece before, or its map is not one.
        """
        if message.number == 0:
            self.forget()
            self._list = message.list
        self._expect(message.list, message.number)
        if message.start < self._stop:
            self.forget()
            raise ProtocolError("the pieces of a list do not ascend")
        for run in _runs(unpack_map(message.data, message.pages), message.start):
            if not self._complete:
                break
            if run.kind == self._last.kind and run.start == self._last.stop:
                self._last = run._replace(start=self._last.start)
            else:
                self._add()
                self._last = run
        self._pieces += 1
        self._stop = message.start + message.pages
        return DiscardedKept(message.request, self._runs)

    def end(self, message: DiscardedEnd) -> DiscardedKept:
        """Write the list.

        :raise ProtocolError: pieces are missing.
        :raise OSError: it can not be written.
        """
        self._expect(message.list, message.pieces)
        self._add()
        answer = DiscardedKept(message.request, self._runs)
        try:
            self._write(message)
        finally:
            self.forget()
        return answer

    def _expect(self, number: int, pieces: int) -> None:
        if number != self._list or pieces != self._pieces:
            self.forget()
            raise ProtocolError(f"piece {pieces} of list {number} is not the one that was due")

    def _add(self) -> None:
        """List the run that has ended."""
        kind, start, stop = self._last
        self._last = _Run(Residence.RESIDENT, 0, 0)
        if kind != Residence.RESIDENT and self._complete:
            self._runs += 1
            self._text += b"%d-%d %s\n" % (start, stop - 1, _WORDS[Residence(kind)].encode())
            self._complete = len(self._text) < LIST_BYTES_MAX

    def _write(self, message: DiscardedEnd) -> None:
        facts = {
            "version": 1,
            "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "uptime": f"{read_uptime_ms() / 1000:.2f}",
            "pages": self._stop,
            "zero": message.zero,
            "layer": message.layer,
            "preserved": message.preserved,
            "discarded-ever": message.discarded,
            "refaulted-ever": message.refaulted,
            "runs": self._runs,
            "complete": "yes" if self._complete else "no",
        }
        head = "".join(f"{name} {value}\n" for name, value in facts.items()).encode()
        path = f"{self._folder}/{_NAME}"
        # Not pathlib, whose import would be a good part of this agent's memory.
        os.makedirs(self._folder, mode=0o755, exist_ok=True)  # noqa: PTH103
        new = f"{path}.new"
        with contextlib.suppress(FileNotFoundError):
            os.unlink(new)  # noqa: PTH108
        descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        try:
            os.fchmod(descriptor, 0o644)
            for part in (head, b"\n", self._text):
                view = memoryview(part)
                while view:
                    view = view[os.write(descriptor, view) :]
        finally:
            os.close(descriptor)
        os.rename(new, path)  # noqa: PTH104


def _runs(residences: bytes, start: int) -> Iterator[_Run]:
    """The runs of pages of the same residence that are not RESIDENT; without a loop over pages."""
    for found in _RUNS.finditer(residences):
        yield _Run(residences[found.start()], start + found.start(), start + found.end())
