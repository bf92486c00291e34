"""The event log of each VM: JSON lines in files that outlive the VM, bounded in size (:mod:`.event_files`).

Whoever has an event to tell never waits: it is put into a bounded queue, and one task writes. What finds the queue full
is counted, not kept; so is what a guest makes happen more often than :mod:`.event_rates` allows. At these rates a VM's
4 MiB hold several days of whatever it does.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import aiofiles
import aiofiles.os

from hva_host.agent.condition import Listener
from hva_host.agent.event_files import FILE_MAX, events_folder, format_line, log_file, older_files, prune
from hva_host.agent.event_rates import EventRates
from hvaqemu.errors import HostError
from hvaqemu.paths import private_folder

log = logging.getLogger(__name__)

#: Lines a second for one event of one VM, and at once after a pause.
_RATE, _BURST = 0.1, 30.0
#: One that comes all the time where memory is reclaimed continuously.
_RATES = {"EPOCH": 1 / 60}
_QUEUE_MAX = 1024
#: A longer line says only what happened.
_LINE_MAX = 1 << 14
#: Lines written at once: no more than a file may hold.
_BATCH_MAX = FILE_MAX // _LINE_MAX
_CLOSE_SECONDS = 5.0
#: Complaints of a log that can not be written, so often at most.
_COMPLAINT_SECONDS = 60.0


class Journal:
    """Writes the logs of all VMs from :meth:`start` to :meth:`close`.

    :param folder: says where the logs go; asked for every batch, in a thread.
    """

    def __init__(self, folder: Callable[[], Path] = events_folder) -> None:
        self._folder = folder
        self._rates = EventRates(_RATE, _BURST, _RATES)
        self._queue: asyncio.Queue[tuple[str, bytes] | None] = asyncio.Queue(_QUEUE_MAX)
        self._lost = 0
        self._complain_at = 0.0
        self._task: asyncio.Task[None] | None = None
        #: VMs whose log was begun by this process, and not rotated since.
        self._begun: set[str] = set()

    def start(self) -> None:
        """Begin to write."""
        self._task = asyncio.create_task(self._run(), name="event logs")

    def write(self, event: str, data: Mapping[str, Any], now: float) -> None:
        """Have an event logged, unless there were many like it lately. Returns at once.

        :param data: fit for JSON; ``name`` is the VM's.
        :param now: seconds, on a clock that does not go back.
        """
        name = data.get("name")
        if not isinstance(name, str) or not name:
            # Of the host, not of a VM; agent.log has it.
            return
        untold = self._rates.admit(event, name, now)
        if untold is None:
            return
        moment = datetime.now(UTC)
        line = format_line(moment, event, dict(data), untold)
        if len(line) > _LINE_MAX:
            line = format_line(moment, event, {"name": name, "left_out": f"{len(line)} bytes"}, untold)
        try:
            self._queue.put_nowait((name, line))
        except asyncio.QueueFull:
            self._lost += 1

    async def close(self) -> None:
        """Write what is left; give up after seconds."""
        if self._task is None:
            return
        try:
            async with asyncio.timeout(_CLOSE_SECONDS):
                await self._queue.put(None)
                await asyncio.shield(self._task)
        except TimeoutError:
            log.warning("event logs: the last events could not be written within %g s", _CLOSE_SECONDS)
            self._task.cancel()
            await asyncio.wait({self._task})

    async def _run(self) -> None:
        last = False
        while not last:
            batch = [await self._queue.get()]
            while len(batch) < _BATCH_MAX and not self._queue.empty():
                batch.append(self._queue.get_nowait())
            last = batch[-1] is None
            lines: dict[str, list[bytes]] = {}
            for name, line in filter(None, batch):
                lines.setdefault(name, []).append(line)
            for name, said in lines.items():
                try:
                    await self._append(name, b"".join(said))
                except (OSError, HostError) as error:
                    self._complain(len(said), error)

    async def _append(self, name: str, text: bytes) -> None:
        path = await asyncio.to_thread(self._place, name)
        async with aiofiles.open(path, "ab+", opener=_private) as file:
            size = await file.seek(0, os.SEEK_END)
            if size + len(text) < FILE_MAX:
                if size:
                    # A host agent before us may have been killed in the middle of a line.
                    await file.seek(size - 1)
                    text = text if await file.read(1) == b"\n" else b"\n" + text
                await file.write(text)
                return
        for newer, older in reversed(list(pairwise([path, *older_files(path)]))):
            if await aiofiles.os.path.exists(newer):
                await aiofiles.os.replace(newer, older)
        self._begun.discard(name)
        async with aiofiles.open(path, "ab", opener=_private) as file:
            await file.write(text)

    def _place(self, name: str) -> Path:
        """The log's file, in a folder that is there, and beside logs that are not too many."""
        folder = self._folder()
        private_folder(folder)
        if name not in self._begun:
            prune(folder)
            self._begun.add(name)
        return log_file(folder, name)

    def _complain(self, lines: int, error: OSError | HostError) -> None:
        self._lost += lines
        if (now := time.monotonic()) >= self._complain_at:
            self._complain_at = now + _COMPLAINT_SECONDS
            log.warning("event logs can not be written: %s; %d events are lost so far", error, self._lost)


@asynccontextmanager
async def journaling() -> AsyncIterator[Listener]:
    """What logs the events of VMs of this process's own."""
    journal = Journal()
    journal.start()
    try:
        yield lambda event, data: journal.write(event, data, time.monotonic())
    finally:
        await journal.close()


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC, 0o600)
