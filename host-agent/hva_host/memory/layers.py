"""Layers: immutable disk images pages come back from. Bytes are checked against the index before they are served."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import xxhash

from hva_host.memory.index import LayerIndex, StaleIndexError, fingerprint_file
from hva_host.memory.ledger import LayerRecord
from hva_host.memory.native import LayerTable, fingerprints
from hvaqemu.errors import HostError
from hvaqemu.pages import PAGE_SHIFT, PAGE_SIZE

#: File systems that refuse RWF_NOWAIT and yet never wait.
_IN_MEMORY = ("tmpfs", "ramfs")


class LayerBetrayed(HostError):
    """A layer no longer holds the bytes it held when pages were discarded against it. They must not be served."""


class NotCached(Exception):
    """The host's page cache does not hold the block; reading it will wait for the disk."""


class Layer:
    """An open layer with its index. Read with ``pread`` only: a mapping would meet SIGBUS if the file were cut."""

    def __init__(self, path: Path, index_path: Path) -> None:
        """Open the file and its index.

        :raise HostError: the file can not be opened.
        :raise StaleIndexError: the index is not of this file.
        """
        self.path = path
        try:
            self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise HostError(f"layer {path}: {error.strerror}") from error
        try:
            self.status = os.fstat(self.fd)
            self.index = LayerIndex(index_path, self.status)
            if not self.index.verify():
                raise StaleIndexError(f"{index_path}: damaged")
        except BaseException:
            os.close(self.fd)
            raise
        self._nowait = _can_refuse_to_wait(self.fd)
        self._in_memory = _file_system(self.status.st_dev) in _IN_MEMORY

    @classmethod
    def recorded(cls, record: LayerRecord) -> Layer:
        """The layer a ledger recorded.

        :raise LayerBetrayed: the file or its index is gone or is not the recorded one.
        """
        try:
            layer = cls(Path(record.path), Path(record.index_path))
        except HostError as error:
            raise LayerBetrayed(error.message) from error
        if (layer.index.seed, layer.index.digest) != (record.seed, record.digest):
            layer.close()
            raise LayerBetrayed(f"layer {record.path}: its index is not the one pages were discarded against")
        return layer

    def record(self) -> LayerRecord:
        """What the ledger must keep of this layer."""
        device, inode, size, mtime_ns = fingerprint_file(self.status)
        return LayerRecord(
            device, inode, size, mtime_ns, self.index.seed, self.index.digest, str(self.path), str(self.index.path)
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
        os.close(self.fd)

    def read(self, block: int, count: int, into: memoryview, *, wait: bool) -> None:
        """Read ``count`` blocks from ``block`` on into the start of ``into``, unchecked.

        :param wait: read from the disk if need be; else raise :class:`NotCached`.
        :raise LayerBetrayed: the file is shorter than it was, or can not be read.
        """
        length, offset = count << PAGE_SHIFT, block << PAGE_SHIFT
        if not wait and not self._nowait and not self._in_memory:
            raise NotCached
        flags = os.RWF_NOWAIT if self._nowait and not wait else 0
        try:
            got = os.preadv(self.fd, [into[:length]], offset, flags)
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


def _can_refuse_to_wait(fd: int) -> bool:
    """Can a read of this file fail instead of waiting for the disk (preadv2(2), RWF_NOWAIT)?"""
    try:
        os.preadv(fd, [bytearray(1)], 0, os.RWF_NOWAIT)
    except BlockingIOError:
        return True
    except OSError as error:
        return error.errno != errno.EOPNOTSUPP
    return True


def _file_system(device: int) -> str:
    """The type of the file system mounted from a device number, "" if it is not known (proc_pid_mountinfo(5))."""
    number = f"{os.major(device)}:{os.minor(device)}"
    try:
        lines = Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines()
    except OSError:
        return ""
    return next((line.split(" - ")[1].split()[0] for line in lines if line.split()[2] == number), "")
