"""A golden image of a test's own, to be altered, cut, lost and put right under running guests."""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hva_host.memory.ledger import LEDGER_NAME
from hva_images import ensure_image
from hvaqemu.image_config import DEFAULT_IMAGE
from hvaqemu.pages import PAGE_SIZE, Residence

_LEDGER = f"/memfd:{LEDGER_NAME} (deleted)"
_INVERT = bytes(255 - value for value in range(256))


class Golden:
    """A private cache that holds a copy of the default image.

    Files are written in threads: whoever opens a layer for writing waits until the host agent has heard of it, and that
    may be this very process.

    :ivar root: the copy of the root disk that VMs are based on.
    """

    def __init__(self, folder: Path) -> None:
        original = ensure_image(DEFAULT_IMAGE, base_dir=Path.cwd(), progress=print)
        self.cache = folder / "c"
        images = self.cache / "images"
        images.mkdir(parents=True, mode=0o700)
        subprocess.run(
            ["cp", "-a", "--sparse=always", "--reflink=auto", original.directory, images], check=True, timeout=120
        )
        self.root = images / original.directory.name / original.root.name
        self.root.chmod(0o600)
        self._right = original.root

    @property
    def index(self) -> Path:
        """The one layer index there is."""
        (found,) = (self.cache / "index").iterdir()
        return found

    async def alter(self, blocks: NDArray[np.int64]) -> None:
        """Change every byte of these blocks in place."""
        await asyncio.to_thread(self._write, blocks, True)

    async def repair(self, blocks: NDArray[np.int64]) -> None:
        """Write back what these blocks held."""
        await asyncio.to_thread(self._write, blocks, False)

    async def cut(self, block: int) -> None:
        """Truncate the file before a block."""
        await asyncio.to_thread(os.truncate, self.root, block * PAGE_SIZE)

    async def lengthen(self) -> None:
        """Give a file that was cut its length and content back."""
        await asyncio.to_thread(self._lengthen)

    def _lengthen(self) -> None:
        before, size = self.root.stat().st_size, self._right.stat().st_size
        os.truncate(self.root, size)
        with self._right.open("rb") as right, self.root.open("r+b") as file:
            for start, stop in _extents(right.fileno(), before, size):
                os.pwrite(file.fileno(), os.pread(right.fileno(), stop - start, start), start)

    def _write(self, blocks: NDArray[np.int64], wrong: bool) -> None:
        with self._right.open("rb") as right, self.root.open("r+b") as file:
            for block in blocks.tolist():
                data = os.pread(right.fileno(), PAGE_SIZE, block * PAGE_SIZE)
                os.pwrite(file.fileno(), data.translate(_INVERT) if wrong else data, block * PAGE_SIZE)


def _extents(fd: int, position: int, size: int) -> Iterator[tuple[int, int]]:
    """Data of a sparse file, at most 16 MiB at a time."""
    while position < size:
        try:
            position = os.lseek(fd, position, os.SEEK_DATA)
        except OSError:
            return
        stop = min(os.lseek(fd, position, os.SEEK_HOLE), position + (16 << 20))
        yield position, stop
        position = stop


class Dependants:
    """The pages of a QEMU's guest that depend on a layer, read from the ledger and not asked of the pager.

    :ivar pfns: ascending.
    :ivar blocks: of the layer, in the order of ``pfns``.
    """

    def __init__(self, qemu: int, memory: int) -> None:
        with _ledger(qemu) as fd:
            length = memory // PAGE_SIZE * 8
            data = os.pread(fd, length, os.fstat(fd).st_size - length)
        entries = np.frombuffer(data, dtype=np.uint64)
        #: Of every page, the residence its entry names.
        self.kinds = (entries >> np.uint64(60)).astype(np.uint8)
        self.pfns = np.flatnonzero(entries >> np.uint64(60) == Residence.LAYER)
        self.blocks = (entries[self.pfns] & np.uint64((1 << 40) - 1)).astype(np.int64)

    def on(self, blocks: NDArray[np.int64]) -> set[int]:
        """The pages that depend on some blocks."""
        return set(self.pfns[np.isin(self.blocks, blocks)].tolist())

    def some_blocks(self, one_in: int) -> NDArray[np.int64]:
        """One in so many of the blocks, all over the image."""
        return np.unique(self.blocks)[::one_in]


@contextmanager
def _ledger(qemu: int) -> Iterator[int]:
    for entry in Path(f"/proc/{qemu}/fd").iterdir():
        if str(entry.readlink()) == _LEDGER:
            fd = os.open(entry, os.O_RDONLY | os.O_CLOEXEC)
            try:
                yield fd
            finally:
                os.close(fd)
            return
    raise AssertionError("QEMU has no ledger")
