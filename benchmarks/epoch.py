"""One epoch over layer pages, beside ``memcmp`` of as many bytes in the same run; and what the C in it buys."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import numpy as np
import xxhash

from benchmarks.figure import Figure, seconds, show
from hva_host.memory.native import equal_pages, fingerprints, zero_pages
from hva_host.pager.membership import Member
from hvaqemu.pages import PAGE_SIZE
from tests.kernel.harness import Guest, make_layer

PAGES = 65536


def main() -> None:
    """Fill a guest with a layer's blocks, run epochs over all of it, compare."""
    rng = np.random.default_rng(1)
    content = rng.bytes(PAGES * PAGE_SIZE)
    with tempfile.TemporaryDirectory() as folder, Guest(PAGES) as guest:
        guest.ram.add_layer(make_layer(Path(folder), [content]))
        best, phases = float("inf"), {}
        for _ in range(5):
            guest.ram.ledger.erase(0, guest.ram.pages)
            for start in range(0, len(content), 1 << 24):
                guest.fill(start // PAGE_SIZE, content[start : start + (1 << 24)])
            epoch = guest.begin(dict.fromkeys(range(PAGES), Member.COPY), seconds=60)
            began = time.perf_counter()
            guest.run(epoch)
            spent = time.perf_counter() - began
            assert epoch.counts["discarded_layer"] == PAGES, epoch.counts
            if spent < best:
                best, phases = spent, dict(epoch.seconds)
    a, b = memoryview(content), memoryview(bytearray(content))
    compare = seconds(lambda: equal_pages(a, b, PAGES))
    hashed = seconds(lambda: fingerprints(a, PAGES, 1))
    loop = seconds(lambda: [xxhash.xxh3_64_intdigest(a[i : i + PAGE_SIZE], 1) for i in range(0, len(a), PAGE_SIZE)])
    in_numpy = seconds(lambda: _numpy_equal(content, bytes(b)))
    zero = seconds(lambda: zero_pages(a, PAGES))
    each = 1e6 / PAGES
    show(
        "epoch",
        [
            Figure(f"epoch over {PAGES} layer pages, bytes a second / memcmp", compare / best, ">= 0.15", "1",
                   f"{best * each:.2f} µs a page / {compare * each:.2f}; "
                   + ", ".join(f"{name} {spent * each:.2f}" for name, spent in phases.items())),
            Figure("fingerprints in C, µs a page", hashed * each, "", "", f"a Python loop: {loop * each:.2f}"),
            Figure("comparing in C, µs a page", compare * each, "", "", f"in numpy: {in_numpy * each:.2f}"),
            Figure("looking for zeros in C, µs a page", zero * each),
        ],
    )  # fmt: skip


def _numpy_equal(a: bytes, b: bytes) -> object:
    left = np.frombuffer(a, np.uint64).reshape(-1, PAGE_SIZE // 8)
    right = np.frombuffer(b, np.uint64).reshape(-1, PAGE_SIZE // 8)
    return (left == right).all(axis=1)
