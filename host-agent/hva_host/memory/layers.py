"""Layers: immutable disk images pages come back from. Bytes are checked against the index before they are served."""

from __future__ import annotations

import os
import stat
from io import FileIO
from pathlib import Path

import numpy as np
import xxhash

from hva_host.memory.index import LayerIndex, StaleIndexError, fingerprint_file
from hva_host.memory.ledger import LayerRecord
from hva_host.memory.native import LayerTable, fingerprints
from hva_host.memory.preloaded import preloaded
from hva_host.memory.waiting import NotCached, can_refuse_to_wait, in_memory
from hvaqemu.errors import HostError
from hvaqemu.faultpoints import reach
from hvaqemu.pages import PAGE_SHIFT, PAGE_SIZE


class LayerBetrayed(HostError):
    """A layer no longer holds the bytes it held when pages were discarded against it. They must not be served."""


class Layer:
    """An open layer with its index. Read with ``pread`` only: a mapping would meet SIGBUS if the file were cut.

    :ivar file: the open file; a fetch under way keeps the one it began with.
    """

    def __init__(self, path: Path, file: FileIO, index: LayerIndex, index_path: Path) -> None:
        self.path = path
        self.index = index
        self._index_path = index_path
        self.switch(file)

    def switch(self, file: FileIO) -> None:
        """Go on with another file in this one's place; what it holds is checked block by block as ever."""
        self.file = file
        self.fd = file.fileno()
        self.status = os.fstat(self.fd)
        self._nowait = can_refuse_to_wait(self.fd)
        self._in_memory = in_memory(self.status.st_dev)

    def record(self) -> LayerRecord:
        """What the ledger must keep of this layer."""
        device, inode, size, mtime_ns = fingerprint_file(self.status)
        return LayerRecord(
            device, inode, size, mtime_ns, self.index.seed, self.index.digest, str(self.path), str(self._index_path)
        )

    @property
    def blocks(self) -> int:
        """4 KiB blocks in the layer."""
        return self.index.blocks

    def table(self, first_entry: int) -> LayerTable:
        """This layer for the C code; ``first_entry`` is the ledger entry of its block 0."""
        index = self.index
        return LayerTable(
            self.fd, not self._nowait, index.seed, first_entry, index.fingerprints, index.ordered, index.ordered_blocks
        )

    def close(self) -> None:
        self.file.close()

    def read(self, block: int, count: int, into: memoryview, *, wait: bool) -> None:
        """Read ``count`` blocks from ``block`` on into the start of ``into``, unchecked.

        :param wait: read from the disk if need be; else raise :class:`NotCached`.
        :raise LayerBetrayed: the file is shorter than it was, or can not be read.
        """
        length, offset = count << PAGE_SHIFT, block << PAGE_SHIFT
        if not wait and not self._nowait and not self._in_memory:
            raise NotCached
        flags = os.RWF_NOWAIT if self._nowait and not wait else 0
        # Held while it is read, also by a helper thread: its number must not become another file's after a switch.
        file = self.file
        try:
            reach("layer.read")
            got = os.preadv(file.fileno(), [into[:length]], offset, flags)
        except BlockingIOError as error:
            raise NotCached from error
        except OSError as error:
            raise LayerBetrayed(f"layer {self.path}: {error.strerror} at block {block}") from error
        if got == length:
            return
        if flags:
            raise NotCached
        raise LayerBetrayed(f"layer {self.path}: ends inside block {block + (got >> PAGE_SHIFT)}")

    def check(self, block: int, count: int, data: memoryview) -> int:
        """How many of ``count`` blocks in ``data``, from the first on, are what the index says they were."""
        if count == 1:
            # A random refault's whole cost is a few calls: the way through numpy would double it.
            found = xxhash.xxh3_64_intdigest(data[:PAGE_SIZE], self.index.seed)
            return int(found == self.index.fingerprints[block])
        wrong = np.flatnonzero(fingerprints(data, count, self.index.seed) != self.index.fingerprints[block:][:count])
        return int(wrong[0]) if len(wrong) else count


def open_layer(path: Path, index_path: Path) -> Layer:
    """A layer to match pages against.

    :raise HostError: the file can not be opened.
    :raise StaleIndexError: the index is missing, damaged, or not of this file.
    """
    file = open_image(path)
    index = LayerIndex.load(index_path)
    index = preloaded(index.seed, index.digest) or index
    if index.identity != fingerprint_file(os.fstat(file.fileno())):
        raise StaleIndexError(f"{index_path}: is of another file")
    return Layer(path, file, index, index_path)


def open_image(path: Path) -> FileIO:
    """A layer's file for reading.

    :raise HostError: it can not be opened, or is no regular file.
    """
    try:
        # Never wait for whoever opens the other end of a FIFO in the file's place.
        file = FileIO(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK))
    except OSError as error:
        raise HostError(f"layer {path}: {error.strerror}") from error
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        raise HostError(f"layer {path}: not a regular file")
    return file
