"""The content index of a layer: a fingerprint per 4 KiB block, kept on disk so that a second VM starts without one.

A fingerprint proposes, it never proves: what is discarded was compared byte for byte. It does check what a layer
serves later: a block that no longer has its fingerprint has changed. Fingerprints are XXH3-64 with a random seed, so
that a guest can not make up pages that collide.

File layout (host byte order): a header page, then the fingerprints, uint64 by block.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from hva_host.memory.native import fingerprints
from hvaqemu.errors import HostError
from hvaqemu.faultpoints import reach
from hvaqemu.pages import PAGE_SIZE

_MAGIC = b"HVAINDX2"
_HEADER = struct.Struct("=8sQQQQQQQ")
_CHUNK = 4 << 20


class StaleIndexError(HostError):
    """An index is missing, damaged, or of another file: build it again."""


def fingerprint_file(status: os.stat_result) -> tuple[int, int, int, int]:
    """What tells one content of a file from another without reading it: device, inode, size, mtime (ns)."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


class LayerIndex:
    """An index, whole in our memory: a mapping would meet SIGBUS if the file were cut.

    :ivar fingerprints: uint64, shape ``(blocks,)``, by block.
    :ivar seed: of the fingerprints.
    :ivar ordered: uint64, the distinct fingerprints of non-zero blocks, ascending; ``ordered_blocks`` (uint32) has
        the block of each.
    :ivar digest: XXH3-64 over ``fingerprints``; equal digests and seeds mean equal layers.
    :ivar identity: of the file that was indexed, as :func:`fingerprint_file` tells it.
    """

    def __init__(self, seed: int, fingerprints: NDArray[np.uint64], identity: tuple[int, ...]) -> None:
        self.seed = seed
        self.fingerprints = fingerprints
        self.identity = identity
        self.digest = xxhash.xxh3_64_intdigest(fingerprints.data)
        self.ordered, self.ordered_blocks = _order(fingerprints, seed)

    @property
    def blocks(self) -> int:
        """4 KiB blocks in the layer."""
        return len(self.fingerprints)

    @classmethod
    def load(cls, path: Path) -> LayerIndex:
        """The index in a file.

        :raise StaleIndexError: it is missing or damaged.
        """
        try:
            with open(path, "rb", opener=_open_regular) as file:
                header = file.read(_HEADER.size).ljust(_HEADER.size, b"\0")
                magic, seed, blocks, *identity, digest = _HEADER.unpack(header)
                size = os.fstat(file.fileno()).st_size
                if magic != _MAGIC or size != PAGE_SIZE + blocks * 8:
                    raise StaleIndexError(f"{path}: damaged")
                file.seek(PAGE_SIZE)
                data = np.empty(blocks, dtype=np.uint64)
                complete = file.readinto(data.data.cast("B")) == blocks * 8
        except (OSError, MemoryError) as error:
            raise StaleIndexError(f"{path}: {getattr(error, 'strerror', error)}") from error
        index = cls(seed, data, tuple(identity))
        if not complete or index.digest != digest:
            raise StaleIndexError(f"{path}: damaged")
        return index

    @classmethod
    def of_layer(
        cls, fd: int, seed: int | None = None, progress: Callable[[int, int], None] | None = None
    ) -> LayerIndex:
        """Index an open layer; with the seed of a lost index of the same content it is that index again.

        :param progress: called with bytes read and bytes in all.
        :raise HostError: it is not a disk image, or became shorter meanwhile.
        :raise OSError: it can not be read.
        """
        status = os.fstat(fd)
        # A qcow2 file may end anywhere; a guest's page is never in the part of a block that is left over.
        size = status.st_size - status.st_size % PAGE_SIZE
        if not size:
            raise HostError(f"size {status.st_size} is less than a block of {PAGE_SIZE}; not a disk image")
        seed = secrets.randbits(64) if seed is None else seed
        return cls(seed, _fingerprint_all(fd, size, seed, progress), fingerprint_file(status))

    def save(self, path: Path) -> None:
        """Write the index; beside ``path`` and then renamed, so that it is there whole or not at all.

        :raise HostError: there is no room.
        """
        header = _HEADER.pack(_MAGIC, self.seed, self.blocks, *self.identity, self.digest)
        try:
            with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name, delete=False) as out:
                try:
                    reach("index.write")
                    out.write(header.ljust(PAGE_SIZE, b"\0"))
                    out.write(self.fingerprints.data.cast("B"))
                    out.flush()
                    Path(out.name).chmod(0o400)
                    Path(out.name).replace(path)
                except BaseException:
                    Path(out.name).unlink(missing_ok=True)
                    raise
        except OSError as error:
            raise HostError(f"{path}: {error.strerror}", "make room for the index") from error


def build_index(layer: Path, path: Path, progress: Callable[[int, int], None] | None = None) -> None:
    """Index ``layer`` into ``path``.

    :param progress: called with bytes read and bytes in all.
    :raise HostError: the layer can not be read, or there is no room for the index.
    """
    try:
        with layer.open("rb") as file:
            index = LayerIndex.of_layer(file.fileno(), progress=progress)
    except HostError as error:
        raise HostError(f"{layer}: {error.message}") from error
    except OSError as error:
        raise HostError(f"{layer}: {error.strerror}") from error
    index.save(path)


def _open_regular(path: str, flags: int) -> int:
    # Never wait for whoever opens the other end of a FIFO in a file's place.
    fd = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "not a regular file")
    return fd


def _zero(seed: int) -> np.uint64:
    return np.uint64(xxhash.xxh3_64_intdigest(bytes(PAGE_SIZE), seed))


def _order(by_block: NDArray[np.uint64], seed: int) -> tuple[NDArray[np.uint64], NDArray[np.uint32]]:
    """Distinct fingerprints of non-zero blocks in ascending order, and the first block of each."""
    distinct, first = np.unique(by_block, return_index=True)
    wanted = distinct != _zero(seed)
    return distinct[wanted], first[wanted].astype(np.uint32)


def _fingerprint_all(fd: int, size: int, seed: int, progress: Callable[[int, int], None] | None) -> NDArray[np.uint64]:
    """The fingerprint of every block; holes are not read, so they take no room in the host's page cache."""
    result = np.full(size // PAGE_SIZE, _zero(seed), dtype=np.uint64)
    buffer = memoryview(bytearray(_CHUNK))
    position = 0
    while (position := _next_data(fd, position, size)) < size:
        end = min(position + _CHUNK, -(-os.lseek(fd, position, os.SEEK_HOLE) // PAGE_SIZE) * PAGE_SIZE, size)
        count = os.preadv(fd, [buffer[: end - position]], position)
        if count <= 0 or count % PAGE_SIZE:
            raise HostError("the file became shorter while it was indexed")
        pages = count // PAGE_SIZE
        first = position // PAGE_SIZE
        result[first : first + pages] = fingerprints(buffer, pages, seed)
        position += count
        if progress is not None:
            progress(position, size)
    return result


def _next_data(fd: int, position: int, size: int) -> int:
    """Where data begins at or after ``position``, rounded down to a block; ``size`` if there is none (lseek(2))."""
    try:
        return max(position, os.lseek(fd, position, os.SEEK_DATA) // PAGE_SIZE * PAGE_SIZE)
    except OSError as error:
        if error.errno == errno.ENXIO:
            return size
        raise
