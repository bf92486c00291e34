"""The C that reads every page of an epoch (``pagescan.c``), as functions on buffers of 4 KiB pages."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hvaqemu.compiler import ensure_library
from hvaqemu.pages import PAGE_SIZE

SOURCE = Path(__file__).with_name("pagescan.c")


def ensure_native() -> Path:
    """Compile what is not compiled yet.

    :raise HostError: no compiler, or no room.
    """
    return ensure_library(SOURCE, packages="gcc, libc6-dev and libxxhash-dev")


@cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(ensure_native()))
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    library.hva_fingerprints.argtypes = (pointer, size, ctypes.c_uint64, pointer)
    library.hva_equal.argtypes = (pointer, pointer, size, pointer)
    library.hva_all_zero.argtypes = (pointer, size, pointer)
    for function in (library.hva_fingerprints, library.hva_equal, library.hva_all_zero):
        function.restype = None
    return library


def _address(pages: memoryview, count: int) -> int:
    if len(pages) < count * PAGE_SIZE:
        raise ValueError(f"{len(pages)} bytes hold no {count} pages")
    return int(np.frombuffer(pages, np.uint8).ctypes.data)


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
