"""The guest agent's look for shared writable mappings: what it finds, and that nothing makes it slow or big."""

from __future__ import annotations

import mmap
import os
import sys
import time
import tracemalloc
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hva_guest import mappings
from hva_guest.classify import with_potential
from hva_guest.mappings import Mapping, Marks, SharedMappings, file_pfns, shared_mappings
from hvaqemu.pages import PageState

MAPS = b"""\
2aa00000000-2aa00001000 r-xp 00000000 fd:00 1234                       /usr/bin/thing
3ff80000000-3ff84000000 rw-s 00000000 fe:00 77                         /opt/mapped
3ff84000000-3ff84001000 -w-s 00001000 fe:00 78                         /opt/with a space (deleted)
3ff85000000-3ff85001000 r--s 00000000 fe:00 79                         /opt/only read
3ff86000000-3ff86001000 rw-p 00000000 fe:00 80                         /opt/private
3ff87000000-3ff87001000 rw-s 00000000 00:01 81                         /dev/zero (deleted)
3ff88000000-3ff88001000 rw-s 00000000 00:19 82                         /dev/shm/tmpfs
3ff89000000-3ff89001000 rw-s 00000000 00:01 83                         /memfd:name (deleted)
3ff8a000000-3ff8a001000 rw-s 00000000 00:01 84                         /SYSV00000000 (deleted)
3ff8b000000-3ff8b001000 rw-s 00000000 00:0e 85                         anon_inode:[perf_event]
3ff8c000000-3ff8c001000 rw-p 00000000 00:00 0                          [heap]
ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0                [vsyscall]
"""
PRESENT, SWAPPED, FILE = 1 << 63, 1 << 62, 1 << 61
#: Soft-dirty, and mapped by one process only.
NOISE = 1 << 55 | 1 << 56


def packed(words: list[int], byteorder: Any = sys.byteorder) -> bytes:
    return b"".join(word.to_bytes(8, byteorder) for word in words)


def finish(look: Generator[None, None, Marks | None]) -> tuple[Marks | None, int]:
    """What a look returns, and how often it gave way."""
    ways = 0
    while True:
        try:
            next(look)
        except StopIteration as end:
            return end.value, ways
        ways += 1


def process(proc: Path, pid: int, maps: bytes, words: dict[int, int]) -> None:
    """A process with words of pagemap by page of its address space."""
    folder = proc / str(pid)
    folder.mkdir()
    (folder / "maps").write_bytes(maps)
    with (folder / "pagemap").open("wb") as file:
        for page, word in words.items():
            os.pwrite(file.fileno(), packed([word]), page * 8)


def line(start: int, pages: int) -> bytes:
    return f"{start << 12:x}-{start + pages << 12:x} rw-s 00000000 fe:00 9   /opt/f\n".encode()


def test_maps_are_read_for_shared_writable_mappings_of_files() -> None:
    assert shared_mappings(MAPS, 5) == [Mapping(0x4000, 5, 0x3FF80000), Mapping(1, 5, 0x3FF84000)]
    # A line that the bound has cut.
    assert shared_mappings(MAPS[: MAPS.index(b"/opt/mapped") - 20], 5) == []


words = st.builds(
    lambda pfn, flags, noise: pfn | flags | noise,
    st.integers(0, (1 << 32) - 1),
    st.sampled_from([PRESENT | FILE, PRESENT | FILE, PRESENT, FILE, SWAPPED | FILE, 0]),
    st.sampled_from([0, NOISE]),
)


@given(st.lists(words, max_size=50), st.sampled_from(["big", "little"]))
def test_frames_of_present_file_pages(found: list[int], byteorder: str) -> None:
    want = [word & 0xFFFFFFFF for word in found if word & (PRESENT | SWAPPED | FILE) == PRESENT | FILE]
    assert list(file_pfns(packed(found, byteorder), byteorder)) == want


@given(st.lists(st.tuples(st.sampled_from([0, 1, 2, 0x12, 0x22, 0x32]), st.booleans()), min_size=1, max_size=50))
def test_only_copies_of_files_become_potential(pages: list[tuple[int, bool]]) -> None:
    classes, mapped = bytes(value for value, _ in pages), bytes(mark for _, mark in pages)
    want = [
        value & ~int(PageState.VOLATILE) | PageState.POTENTIAL if mark and value in (2, 0x12) else value
        for value, mark in pages
    ]
    assert list(with_potential(classes, mapped)) == want


def test_marks_outside_memory_are_none() -> None:
    marks = Marks(10)
    marks.add(iter([3, 9, 10, 1 << 31]))
    assert marks.part(0, 10) == bytes([0, 0, 0, 1, 0, 0, 0, 0, 0, 1])
    assert marks.part(4, 5) == b""


def test_a_look_marks_what_processes_have_mapped(tmp_path: Path) -> None:
    process(tmp_path, 7, line(100, 4), {100: PRESENT | FILE | 5, 102: PRESENT | FILE | NOISE | 6, 103: PRESENT | 7})
    process(tmp_path, 8, MAPS[: MAPS.index(b"3ff8")], {})
    process(tmp_path, 9, b"", {})
    # Gone between two of our looks at it.
    (tmp_path / "10").mkdir()
    (tmp_path / "10" / "maps").write_bytes(line(1, 1))
    (tmp_path / "meminfo").write_bytes(b"")
    shared = SharedMappings(str(tmp_path))
    for _ in range(3):
        marks, _ways = finish(shared.look(8))
        assert marks is not None
        assert marks.part(0, 8) == bytes([0, 0, 0, 0, 0, 1, 1, 0])
    (tmp_path / "7" / "maps").write_bytes(b"")
    (tmp_path / "10" / "maps").unlink()
    assert finish(shared.look(8))[0] is None


def test_many_processes_take_turns_and_those_that_map_come_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for pid in range(1, 400):
        process(tmp_path, pid, line(1, 1) if pid == 333 else b"", {1: PRESENT | FILE | 2} if pid == 333 else {})
    shared = SharedMappings(str(tmp_path))
    looked: list[int] = []
    maps = shared._maps

    def look(pid: int) -> Any:
        looked.append(pid)
        return maps(pid)

    monkeypatch.setattr(shared, "_maps", look)
    # The time is up after the first process of each look.
    monkeypatch.setattr(mappings, "LOOK_SECONDS", 0.0)
    for _ in range(400):
        finish(shared.look(8))
    assert set(looked[: looked.index(333)]) == set(looked[: looked.index(333) + 1]) - {333}
    assert looked[-1] == 333, "known, so it comes first"
    monkeypatch.setattr(mappings, "LOOK_SECONDS", 10.0)
    marks, _ways = finish(shared.look(8))
    assert marks is not None and marks.part(2, 1)


def test_a_huge_sparse_mapping_is_neither_slow_nor_hides_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mappings, "_STEP_SECONDS", 0.0)
    tib = 1 << 28
    process(tmp_path, 7, line(0x1000, tib) + line(tib * 2, 2), {tib * 2: PRESENT | FILE | 5})
    os.truncate(tmp_path / "7" / "pagemap", tib * 3 * 8)
    shared = SharedMappings(str(tmp_path))
    begun = time.monotonic()
    tracemalloc.start()
    marks, ways = finish(shared.look(1 << 22))
    _now, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert marks is not None and marks.part(5, 1)
    assert peak < 2 << 20
    # Two halves of a look, and what one piece takes more than its time.
    assert time.monotonic() - begun < 4 * mappings.LOOK_SECONDS
    assert shared.seconds < 4 * mappings.LOOK_SECONDS
    assert ways > 0, "it gave way to whoever asks the agent something"


def test_a_real_mapping_of_ours_is_found(tmp_path: Path) -> None:
    size = 64 * mmap.PAGESIZE
    (tmp_path / "file").write_bytes(bytes(size))
    if os.statvfs(tmp_path).f_fsid == os.statvfs("/dev/shm").f_fsid:
        pytest.skip("the folder is in memory")
    with (tmp_path / "file").open("r+b") as file, mmap.mmap(file.fileno(), size) as area:
        assert sum(area[place] for place in range(0, size, mmap.PAGESIZE)) == 0
        found = shared_mappings(Path("/proc/self/maps").read_bytes(), os.getpid())
        assert [mapping.pages for mapping in found] == [64]
        with Path("/proc/self/pagemap").open("rb", buffering=0) as pagemap:
            frames = list(file_pfns(os.pread(pagemap.fileno(), 64 * 8, found[0].start * 8), sys.byteorder))
    # Without privilege the kernel shows frame 0 for all of them.
    assert len(frames) == 64
