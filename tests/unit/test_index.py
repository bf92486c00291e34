"""Layer indexes: what they find, and that a damaged or foreign one is noticed."""

from __future__ import annotations

import os
import random
from pathlib import Path

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from hva_host.agent.accounts import cached_bytes
from hva_host.memory.index import LayerIndex, StaleIndexError, build_index
from hva_host.memory.layers import open_layer
from hva_host.memory.native import LayerTable, equal_pages, fingerprints, lookup, zero_pages
from hvaqemu.errors import HostError
from hvaqemu.pages import PAGE_SIZE


def page(seed: int) -> bytes:
    return bytes(PAGE_SIZE) if seed == 0 else random.Random(seed).randbytes(PAGE_SIZE)


def make(folder: Path, seeds: list[int]) -> tuple[Path, Path]:
    image, index = folder / "golden.raw", folder / "golden.idx"
    image.write_bytes(b"".join(page(seed) for seed in seeds))
    index.unlink(missing_ok=True)
    build_index(image, index)
    return image, index


def table(index: LayerIndex) -> LayerTable:
    return LayerTable(-1, False, index.seed, 0, index.fingerprints, index.ordered, index.ordered_blocks)


def prints(index: LayerIndex, seeds: list[int]) -> np.ndarray:
    return fingerprints(memoryview(b"".join(page(seed) for seed in seeds)), len(seeds), index.seed)


@settings(max_examples=30)
@given(layer=st.lists(st.integers(0, 9), min_size=1, max_size=30), wanted=st.lists(st.integers(0, 12), max_size=30))
def test_lookup_finds_a_block_of_the_same_content_or_none(
    tmp_path_factory: pytest.TempPathFactory, layer: list[int], wanted: list[int]
) -> None:
    _, path = make(tmp_path_factory.mktemp("index"), layer)
    index = LayerIndex.load(path)
    for seed, block in zip(wanted, lookup(table(index), prints(index, wanted)).tolist(), strict=True):
        if seed not in layer:
            assert block == -1
        else:
            # Zeros are not looked for: they need no layer to come back from.
            assert layer[block] == seed or (seed == 0 and block == -1)


def test_a_run_is_found_as_a_run_where_blocks_repeat(tmp_path: Path) -> None:
    _, path = make(tmp_path, [1, 7, 2, 3, 7, 4])
    index = LayerIndex.load(path)
    assert lookup(table(index), prints(index, [3, 7, 4])).tolist() == [3, 4, 5]


def test_holes_are_zeros_and_are_not_read(tmp_path: Path) -> None:
    image, path = tmp_path / "sparse.raw", tmp_path / "sparse.idx"
    with image.open("wb") as file:
        for block, seed in ((0, 1), (2000, 2), (2001, 3)):
            file.seek(block * PAGE_SIZE)
            file.write(page(seed))
        file.truncate(4000 * PAGE_SIZE)
    os.sync()
    fd = os.open(image, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)
    build_index(image, path)
    index = LayerIndex.load(path)
    assert lookup(table(index), prints(index, [1, 2, 3])).tolist() == [0, 2000, 2001]
    assert (index.fingerprints == prints(index, [0])[0]).sum() == 3997
    assert cached_bytes(image) < 1000 * PAGE_SIZE


def test_native_functions_agree_with_the_library(tmp_path: Path) -> None:
    data = memoryview(b"".join(page(seed) for seed in (1, 0, 2)))
    assert fingerprints(data, 3, 9).tolist() == [
        xxhash.xxh3_64_intdigest(data[i * PAGE_SIZE : (i + 1) * PAGE_SIZE], 9) for i in range(3)
    ]
    assert zero_pages(data, 3).tolist() == [False, True, False]
    assert zero_pages(memoryview(bytes(PAGE_SIZE - 1) + b"x"), 1).tolist() == [False]
    other = bytearray(data)
    other[2 * PAGE_SIZE - 1] = 1
    assert equal_pages(data, memoryview(other), 3).tolist() == [True, False, True]
    with pytest.raises(ValueError):
        fingerprints(data, 4, 0)


def test_an_index_of_another_file_or_damaged_is_stale(tmp_path: Path) -> None:
    image, path = make(tmp_path, [1, 2, 3])
    whole = path.read_bytes()
    os.utime(image, ns=(1, 1))
    with pytest.raises(StaleIndexError, match="another file"):
        open_layer(image, path)
    image, path = make(tmp_path, [1, 2, 3])
    path.chmod(0o600)
    damaged = bytearray(path.read_bytes())
    damaged[PAGE_SIZE] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(StaleIndexError, match="damaged"):
        open_layer(image, path)
    path.write_bytes(whole[: PAGE_SIZE + 8])
    with pytest.raises(StaleIndexError, match="damaged"):
        open_layer(image, path)
    path.write_bytes(b"")
    with pytest.raises(StaleIndexError):
        open_layer(image, path)
    path.unlink()
    with pytest.raises(StaleIndexError):
        open_layer(image, path)


def test_what_is_no_image_is_not_indexed(tmp_path: Path) -> None:
    for content in (b"", b"x" * 100):
        (tmp_path / "odd").write_bytes(content)
        with pytest.raises(HostError, match="not a disk image"):
            build_index(tmp_path / "odd", tmp_path / "odd.idx")
    with pytest.raises(HostError):
        build_index(tmp_path / "missing", tmp_path / "odd.idx")
    assert not list(tmp_path.glob("odd.idx*"))
