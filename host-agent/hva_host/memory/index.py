"""The content index of a layer: a fingerprint per 4 KiB block, on disk, memory-mapped, shared by all VMs.

A fingerprint proposes, it never proves: what is discarded was compared byte for byte. It does check what a layer
serves later: a block that no longer has its fingerprint has changed. Fingerprints are XXH3-64 with a random seed, so
that a guest can not make up pages that collide.

File layout (host byte order): a header page, then ``fingerprints`` uint64 by block, then for lookups the distinct
fingerprints of non-zero blocks in ascending order (uint64) and the block of each (uint32).
"""

from __future__ import annotations

import errno
import mmap
import os
import secrets
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from hva_host.memory.native import fingerprints
from hvaqemu.errors import HostError
from hvaqemu.pages import PAGE_SIZE

_MAGIC = b"HVAINDX1"
_HEADER = struct.Struct("=8sQQQQQQQQ")
_CHUNK = 4 << 20


class StaleIndexError(HostError):
    """An index is missing, damaged, or of another file: build it again."""


def fingerprint_file(status: os.stat_result) -> tuple[int, int, int, int]:
    """What tells one content of a file from another without reading it: device, inode, size, mtime (ns)."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


class LayerIndex:
    """A mapped index.

    :ivar fingerprints: uint64, shape ``(blocks,)``, by block.
    :ivar seed: of the fingerprints.
    :ivar ordered: uint64, the distinct fingerprints of non-zero blocks, ascending; ``ordered_blocks`` (uint32) has
        the block of each.
    :ivar digest: XXH3-64 over ``fingerprints``; equal digests and seeds mean equal layers.
    """

    def __init__(self, path: Path, layer: os.stat_result) -> None:
        """Map the index at ``path``.

        :raise StaleIndexError: it is missing, damaged, or not of the file that ``layer`` describes.
        """
        self.path = path
        try:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size < PAGE_SIZE:
                    raise StaleIndexError(f"{path}: not a layer index")
                data = mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ)
        except OSError as error:
            raise StaleIndexError(f"{path}: {error.strerror}") from error
        magic, seed, blocks, distinct, *identity, digest = _HEADER.unpack_from(data)
        self.seed: int = seed
        self.digest: int = digest
        if magic != _MAGIC or size != PAGE_SIZE + blocks * 8 + distinct * 12:
            raise StaleIndexError(f"{path}: damaged")
        if tuple(identity) != fingerprint_file(layer):
            raise StaleIndexError(f"{path}: is of another file")
        self.blocks: int = blocks
        self.fingerprints: NDArray[np.uint64] = np.frombuffer(data, np.uint64, blocks, PAGE_SIZE)
        self.ordered: NDArray[np.uint64] = np.frombuffer(data, np.uint64, distinct, PAGE_SIZE + blocks * 8)
        self.ordered_blocks: NDArray[np.uint32] = np.frombuffer(
            data, np.uint32, distinct, PAGE_SIZE + (blocks + distinct) * 8
        )

    def verify(self) -> bool:
        """Is the index itself undamaged? Reads all of it."""
        return _digest(self.fingerprints) == self.digest


def _digest(by_block: NDArray[np.uint64]) -> int:
    return xxhash.xxh3_64_intdigest(by_block.data)


def build_index(layer: Path, path: Path, progress: Callable[[int, int], None] | None = None) -> None:
    """Index ``layer`` into ``path``; written beside it and renamed, so that it is there whole or not at all.

    :param progress: called with bytes read and bytes in all.
    :raise HostError: the layer can not be read, or there is no room for the index.
    """
    try:
        with layer.open("rb") as file:
            status = os.fstat(file.fileno())
            if not status.st_size or status.st_size % PAGE_SIZE:
                raise HostError(f"{layer}: size {status.st_size} is not a multiple of {PAGE_SIZE}; not a disk image")
            seed = secrets.randbits(64)
            zero = fingerprints(memoryview(bytes(PAGE_SIZE)), 1, seed)[0]
            by_block = _fingerprint_all(file.fileno(), status.st_size, seed, zero, progress)
    except OSError as error:
        raise HostError(f"{layer}: {error.strerror}") from error
    distinct, first = np.unique(by_block, return_index=True)
    wanted = distinct != zero
    distinct, first = distinct[wanted], first[wanted].astype(np.uint32)
    digest = _digest(by_block)
    header = _HEADER.pack(_MAGIC, seed, len(by_block), len(distinct), *fingerprint_file(status), digest)
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name, delete=False) as out:
            try:
                out.write(header.ljust(PAGE_SIZE, b"\0"))
                for array in (by_block, distinct, first):
                    out.write(array.data.cast("B"))
                out.flush()
                Path(out.name).chmod(0o400)
                Path(out.name).replace(path)
            except BaseException:
                Path(out.name).unlink(missing_ok=True)
                raise
    except OSError as error:
        raise HostError(f"{path}: {error.strerror}", "make room for the index") from error


def _fingerprint_all(
    fd: int, size: int, seed: int, zero: np.uint64, progress: Callable[[int, int], None] | None
) -> NDArray[np.uint64]:
    """The fingerprint of every block; holes are not read, so they take no room in the host's page cache."""
    result = np.full(size // PAGE_SIZE, zero, dtype=np.uint64)
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
