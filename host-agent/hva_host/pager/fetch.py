"""What must come from the disk is read in a helper thread, so that no other fault waits for it: blocks of layers, and
slots of a store that is a file.

The helper reads and never applies: what it brings carries the ledger entries it was fetched for, and the pager's own
thread uses it only if they are still the same. A layer's entry names bytes that never change; a slot of the store is
pinned meanwhile, so that the same entry can not come to name another page's.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hva_host.memory.layers import Layer, LayerBetrayed
from hva_host.memory.store import Store, StoreBetrayed
from hvaqemu.pages import PAGE_SHIFT, Run

#: What the store is called where a layer would be named by its path.
STORE = "the store"


@dataclass(frozen=True)
class Fetched:
    """What was read for the pages ``run`` with the ledger entries ``entries``, or why it could not be.

    :ivar blocks: the run's bytes in a layer.
    :ivar slots: what the pages' slots of the store hold, one after the other, up to one that could not be read.
    :ivar pinned: entries whose slots have a use more until somebody takes it back.
    """

    source: str
    run: Run
    entries: NDArray[np.uint64]
    blocks: memoryview | bytes = b""
    slots: tuple[bytes, ...] = ()
    pinned: tuple[int, ...] = ()
    error: str = ""


class Fetcher:
    """One helper thread.

    :ivar fd: readable when :meth:`results` has something.
    """

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._wanted: queue.SimpleQueue[Callable[[], Fetched] | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[Fetched] = queue.SimpleQueue()
        self._under_way: set[int] = set()
        self._thread: threading.Thread | None = None

    def fetch_blocks(self, layer: Layer, block: int, run: Run, entries: NDArray[np.uint64]) -> None:
        """Read blocks for a run; a first page that is being fetched already is not fetched twice."""

        def read() -> Fetched:
            try:
                data = memoryview(bytearray(run.pages << PAGE_SHIFT))
                layer.read(block, run.pages, data, wait=True)
            except LayerBetrayed as betrayal:
                return Fetched(str(layer.path), run, entries, error=betrayal.message)
            return Fetched(str(layer.path), run, entries, data)

        self._fetch(str(layer.path), run, entries, read)

    def fetch_slots(self, store: Store, run: Run, entries: NDArray[np.uint64]) -> None:
        """Read slots of the store for a run; as above."""
        if self.fetches(run.start):
            return
        pinned = tuple(store.pin(entries.tolist()))

        def read() -> Fetched:
            slots: list[bytes] = []
            error = ""
            for entry in entries.tolist():
                try:
                    slots.append(store.read_waiting(entry))
                except StoreBetrayed as betrayal:
                    error = betrayal.message
                    break
            return Fetched(STORE, run, entries, slots=tuple(slots), pinned=pinned, error="" if slots else error)

        self._fetch(STORE, run, entries, read, pinned)

    def _fetch(
        self,
        source: str,
        run: Run,
        entries: NDArray[np.uint64],
        read: Callable[[], Fetched],
        pinned: tuple[int, ...] = (),
    ) -> None:
        if self.fetches(run.start):
            return
        self._under_way.add(run.start)
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="fetch", daemon=True)
            self._thread.start()

        def job() -> Fetched:
            try:
                return read()
            except Exception as problem:
                # Whatever it is, the thread must go on: no other brings anything from the disk.
                return Fetched(source, run, entries, pinned=pinned, error=f"{source}: {problem!r}")

        self._wanted.put(job)

    def fetches(self, pfn: int) -> bool:
        """Is a run that begins with this page being fetched?"""
        return pfn in self._under_way

    @property
    def under_way(self) -> int:
        """How many runs are being fetched."""
        return len(self._under_way)

    def results(self) -> list[Fetched]:
        """What has come since the last call."""
        try:
            os.eventfd_read(self.fd)
        except BlockingIOError:
            return []
        found = []
        while not self._done.empty():
            result = self._done.get_nowait()
            self._under_way.discard(result.run.start)
            found.append(result)
        return found

    def close(self) -> None:
        """End the thread once it has read what it reads now."""
        if self._thread is not None:
            self._wanted.put(None)
            self._thread.join(timeout=5)
        os.close(self.fd)

    def _work(self) -> None:
        while (job := self._wanted.get()) is not None:
            self._done.put(job())
            os.eventfd_write(self.fd, 1)
