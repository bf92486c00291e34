"""The host's end of the letter box between tests and programs in a guest: a raw disk. See ``guest/board.py``."""

from __future__ import annotations

import json
import struct
import time
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hvaqemu.units import MiB
from tests.vm.harness import STEP_SECONDS, until

#: The serial number of the first of a VM's extra disks.
SERIAL = "extra0"
_PAGE = 4096
_HEAD = struct.Struct(">II")


class Board:
    """Orders to a program in the guest, and its answers."""

    def __init__(self, disk: Path) -> None:
        """:param disk: made anew; for the VM's first extra disk."""
        self.disk = disk
        self._orders: list[tuple[int, str, int | str]] = []
        self._number = 0
        disk.write_bytes(bytes(MiB))

    def clear(self) -> None:
        """Nothing is ordered and nothing was answered: for another program on the same disk."""
        self._orders.clear()
        self._write(0, bytes(2 * _PAGE))

    def order(self, what: str, argument: int | str = 0) -> int:
        """Order something; the order's number.

        Every program knows ``signal``: send the guest agent a signal.
        """
        done = self.answer().get("done", 0)
        self._number += 1
        self._orders = [each for each in self._orders if each[0] > done] + [(self._number, what, argument)]
        text = json.dumps(self._orders).encode()
        block = _HEAD.pack(len(text), zlib.crc32(text)) + text
        assert len(block) <= _PAGE, "the guest carries nothing out any more"
        self._write(0, block)
        return self._number

    def answer(self) -> dict[str, Any]:
        """The program's newest answer; empty before the first."""
        while True:
            with self.disk.open("rb") as file:
                file.seek(_PAGE)
                block = file.read(_PAGE)
            length, check = _HEAD.unpack_from(block)
            text = block[_HEAD.size : _HEAD.size + length]
            # QEMU may be in the middle of writing it.
            if zlib.crc32(text) == check:
                return dict(json.loads(text)) if text else {}

    @property
    def beat(self) -> int:
        """How often the program has answered."""
        return int(self.answer().get("beat", 0))

    @property
    def touches(self) -> int:
        """Pages that a probe has touched; 0 before it has begun."""
        return int(self.answer().get("pauses", {}).get("touches", 0))

    async def beats(self, count: int = 2, seconds: float = STEP_SECONDS) -> None:
        """Wait until the program has answered ``count`` times more."""
        before = self.beat
        await until(lambda: self.beat >= before + count, seconds, "the program in the guest")

    async def carried_out(self, number: int, seconds: float = STEP_SECONDS) -> None:
        """Wait until the program has done what was ordered."""
        await until(lambda: self.answer().get("done", 0) >= number, seconds, f"order {number} in the guest")

    async def do(self, what: str, argument: int | str = 0) -> None:
        """Order something and wait until it is done."""
        await self.carried_out(self.order(what, argument))

    def _write(self, offset: int, data: bytes) -> None:
        with self.disk.open("r+b") as file:
            file.seek(offset)
            file.write(data)


@dataclass(frozen=True)
class Gap:
    """A time in which the probe in the guest could not touch memory: when it began (host's monotonic), and seconds."""

    began: float
    seconds: float

    def __contains__(self, moment: float) -> bool:
        return self.began <= moment <= self.began + self.seconds


class GapLog:
    """Collects the gaps that a probe in the guest tells of, and tells when they were by the host's clock."""

    def __init__(self) -> None:
        self._seen = -1
        self._found: list[tuple[float, float]] = []
        #: Host's clock minus guest's: an answer is never seen before it is written, so the least there was is nearest.
        self._offset = float("inf")

    def look(self, answer: Mapping[str, Any]) -> None:
        """To be called several times a second with the program's newest answer."""
        pauses = answer.get("pauses")
        if not pauses:
            return
        self._offset = min(self._offset, time.monotonic() - pauses["now_s"])
        for number, began, seconds in pauses["gaps"]:
            if number > self._seen:
                self._seen = number
                self._found.append((began, seconds))

    @property
    def gaps(self) -> list[Gap]:
        """All gaps so far, oldest first."""
        return [Gap(began + self._offset, seconds) for began, seconds in self._found]
