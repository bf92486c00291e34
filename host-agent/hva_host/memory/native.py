"""The C that reads every page of an epoch (``pagescan.c``), as functions on buffers of 4 KiB pages."""

from __future__ import annotations

import ctypes
import os
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hvaqemu.compiler import ensure_library
from hvaqemu.pages import PAGE_SIZE

SOURCE = Path(__file__).with_name("pagescan.c")
#: Pages of scratch memory :func:`prove_copies` works in.
SCRATCH_PAGES = 64

_pointer, _size = ctypes.c_void_p, ctypes.c_size_t


class LayerTable(NamedTuple):
    """An open layer as the C code wants it.

    ``fingerprints`` is uint64 by block; ``ordered`` (uint64, ascending) and ``blocks`` (uint32) are for lookups.
    """

    fd: int
    may_wait: bool
    seed: int
    first_entry: int
    fingerprints: NDArray[np.uint64]
    ordered: NDArray[np.uint64]
    blocks: NDArray[np.uint32]


class _Layer(ctypes.Structure):
    _fields_ = [
        ("fd", ctypes.c_int32),
        ("may_wait", ctypes.c_int32),
        ("seed", ctypes.c_uint64),
        ("first_entry", ctypes.c_uint64),
        ("blocks", ctypes.c_uint64),
        ("fingerprints", _pointer),
        ("distinct", ctypes.c_uint64),
        ("sorted", _pointer),
        ("sorted_blocks", _pointer),
    ]


def ensure_native() -> Path:
    """Compile what is not compiled yet.

    :raise HostError: no compiler, or no room.
    """
    return ensure_library(SOURCE, packages="gcc, libc6-dev and libxxhash-dev", flags=_vector_flags())


def load_native() -> None:
    """Load it now, so that processes forked from this one share it.

    :raise HostError: as :func:`ensure_native`.
    """
    _library()


def _vector_flags() -> list[str]:
    """XXH3 takes half the time with AVX2, which not every x86-64 has (proc_cpuinfo(5))."""
    try:
        return ["-mavx2"] if " avx2 " in Path("/proc/cpuinfo").read_text() else []
    except OSError:
        return []


@cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(ensure_native()))
    layer = ctypes.POINTER(_Layer)
    u64, fd = ctypes.c_uint64, ctypes.c_int
    library.hva_fingerprints.argtypes = (_pointer, _size, u64, _pointer)
    library.hva_equal.argtypes = (_pointer, _pointer, _size, _pointer)
    library.hva_all_zero.argtypes = (_pointer, _size, _pointer)
    library.hva_lookup.argtypes = (layer, _pointer, _size, _pointer)
    library.hva_prove.argtypes = (fd, _pointer, _size, layer, _size, u64, _pointer, _pointer, _pointer)
    for function in (library.hva_fingerprints, library.hva_equal, library.hva_all_zero, library.hva_lookup):
        function.restype = None
    return library


def _address(pages: memoryview, count: int) -> int:
    if len(pages) < count * PAGE_SIZE:
        raise ValueError(f"{len(pages)} bytes hold no {count} pages")
    return int(np.frombuffer(pages, np.uint8).ctypes.data)


def _layer(table: LayerTable) -> _Layer:
    return _Layer(
        table.fd,
        table.may_wait,
        table.seed,
        table.first_entry,
        len(table.fingerprints),
        table.fingerprints.ctypes.data,
        len(table.ordered),
        table.ordered.ctypes.data,
        table.blocks.ctypes.data,
    )


def fingerprints(pages: memoryview, count: int, seed: int) -> NDArray[np.uint64]:
    """XXH3-64 of the first ``count`` pages of a byte buffer; shape ``(count,)``.

    :raise ValueError: the buffer is shorter.
    """
    out = np.empty(count, dtype=np.uint64)
    _library().hva_fingerprints(_address(pages, count), count, seed, out.ctypes.data)
    return out


def equal_pages(a: memoryview, b: memoryview, count: int) -> NDArray[np.bool_]:
    """Which of the first ``count`` pages of two byte buffers are the same, byte for byte; shape ``(count,)``.

    :raise ValueError: a buffer is shorter.
    """
    out = np.empty(count, dtype=np.bool_)
    _library().hva_equal(_address(a, count), _address(b, count), count, out.ctypes.data)
    return out


def zero_pages(pages: memoryview, count: int) -> NDArray[np.bool_]:
    """Which of the first ``count`` pages of a byte buffer are all zeros; shape ``(count,)``.

    :raise ValueError: the buffer is shorter.
    """
    out = np.empty(count, dtype=np.bool_)
    _library().hva_all_zero(_address(pages, count), count, out.ctypes.data)
    return out


def lookup(table: LayerTable, wanted: NDArray[np.uint64]) -> NDArray[np.int64]:
    """The block of a layer with each wanted fingerprint, -1 where there is none; shapes ``(n,)``.

    Where several blocks are alike, the one that continues the block of the page before is preferred: files are read
    in order, and a run of blocks refaults in one call.
    """
    blocks = np.empty(len(wanted), dtype=np.int64)
    _library().hva_lookup(_layer(table), wanted.ctypes.data, len(wanted), blocks.ctypes.data)
    return blocks


def prove_copies(
    ram: int, pfns: NDArray[np.int64], layers: list[LayerTable], zero_entry: int, scratch: int
) -> tuple[NDArray[np.uint64], NDArray[np.bool_]]:
    """The ledger entries of pages that are zeros or equal a layer's block, byte for byte, as they are now.

    :param ram: descriptor of the backing.
    :param pfns: ascending; shape ``(n,)``.
    :param scratch: address of :data:`SCRATCH_PAGES` pages.
    :return: entries (0: no copy), and whether a page's block must first be read from the disk; shapes ``(n,)``.
    :raise OSError: RAM could not be read.
    """
    entries = np.empty(len(pfns), dtype=np.uint64)
    postponed = np.empty(len(pfns), dtype=np.bool_)
    tables = (_Layer * len(layers))(*(_layer(table) for table in layers))
    error = _library().hva_prove(
        ram,
        pfns.ctypes.data,
        len(pfns),
        tables,
        len(layers),
        zero_entry,
        entries.ctypes.data,
        postponed.ctypes.data,
        scratch,
    )
    if error:
        raise OSError(error, f"reading guest RAM: {os.strerror(error)}")
    return entries, postponed
