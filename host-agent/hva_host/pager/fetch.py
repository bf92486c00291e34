"""Layer blocks that must come from the disk are read in a helper thread, so that no other fault waits for them.

The helper reads and never applies: what it brings carries the ledger entry it was fetched for, and the pager's own
thread uses it only if the entry is still the same.
"""

from __future__ import annotations

import os
import queue
import threading
from dataclasses import dataclass

from hva_host.memory.layers import Layer, LayerBetrayed
from hvaqemu.pages import PAGE_SHIFT, Run


@dataclass(frozen=True)
class Fetched:
    """``run.pages`` blocks read for the ledger entry ``entry`` of ``run.start``, or why they could not be."""

    layer: str
    run: Run
    entry: int
    data: memoryview
    error: str = ""


class Fetcher:
    """One helper thread.

    :ivar fd: readable when :meth:`results` has something.
    """

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._wanted: queue.SimpleQueue[tuple[Layer, int, Run, int] | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[Fetched] = queue.SimpleQueue()
        self._under_way: set[int] = set()
        self._thread: threading.Thread | None = None

    def fetch(self, layer: Layer, block: int, run: Run, entry: int) -> None:
        """Read blocks for a run; a first page that is being fetched already is not fetched twice."""
        if run.start in self._under_way:
            return
        self._under_way.add(run.start)
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="fetch", daemon=True)
            self._thread.start()
        self._wanted.put((layer, block, run, entry))

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
            layer, block, run, entry = job
            data, error = memoryview(b""), ""
            try:
                data = memoryview(bytearray(run.pages << PAGE_SHIFT))
                layer.read(block, run.pages, data, wait=True)
            except LayerBetrayed as betrayal:
                error = betrayal.message
            except Exception as problem:
                # Whatever it is, the thread must go on: no other brings blocks from the disk.
                error = f"layer {layer.path}: {problem!r}"
            self._done.put(Fetched(str(layer.path), run, entry, data, error))
            os.eventfd_write(self.fd, 1)
