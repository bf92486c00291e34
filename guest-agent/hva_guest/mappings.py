"""Which pages processes have mapped shared and writable, from /proc/PID/maps and /proc/PID/pagemap.

What is found makes VOLATILE pages POTENTIAL, and nothing more: a page that processes, mappings and bounds hide stays
VOLATILE, which costs a refault and never a byte. So looking is bounded in everything, and may miss.

A process is looked at in rounds. One that had such a mapping is looked at in every look; the others take turns while
there is time; one without memory of its own (a kernel thread) comes again only every :data:`_BARE_ROUNDS` rounds.
"""

from __future__ import annotations

import itertools
import mmap
import os
import re
import sys
import time
from array import array
from collections import deque
from collections.abc import Collection, Generator, Iterator
from typing import NamedTuple

from hva_guest.memory import read_bytes
from hvaqemu.pages import PAGE_SHIFT

#: Seconds each half of a look (finding mappings, finding their pages) may take of the agent's time, and after which
#: it gives way to whoever asks something.
LOOK_SECONDS = 0.25
_STEP_SECONDS = 0.01
_PROCESSES_MAX = 32 * 1024
_KNOWN_MAX = 256
_BARE_ROUNDS = 16
#: Of one process: some 2,500 mappings.
_MAPS_BYTES_MAX = 256 * 1024
_MAPPINGS_MAX = 1024
#: Of one mapping: 4 GiB. What lies behind is VOLATILE.
_MAPPING_PAGES_MAX = 1024 * 1024
#: Pages of pagemap read in one go: 64 KiB.
_PIECE_PAGES = 8 * 1024
_NOTHING = bytes(_PIECE_PAGES * 8)

#: start, stop, inode, path of a shared writable mapping (proc_pid_maps(5)).
_SHARED = re.compile(rb"^([0-9a-f]+)-([0-9a-f]+) .w.s [0-9a-f]+ [0-9a-f]+:[0-9a-f]+ ([1-9][0-9]*) +(/.*)$", re.M)
#: Devices, tmpfs and memory with a name: none of them is a copy of a disk.
_NO_FILES = (b"/dev/", b"/memfd:", b"/SYSV", b"/[", b"/anon_hugepage")
#: The highest byte of a pagemap word of a page that is present and of a file (bits 63 and 61, not 62: swapped;
#: Documentation/admin-guide/mm/pagemap.rst).
_FILE_PAGES = bytes(value & 0xE0 == 0xA0 for value in range(256))


class Mapping(NamedTuple):
    """``pages`` pages of a process's address space from page ``start`` on, counted from address 0."""

    pages: int
    pid: int
    start: int


def shared_mappings(maps: bytes, pid: int) -> list[Mapping]:
    """The shared writable mappings of files in the text of a process's maps."""
    found = []
    for low, high, _inode, path in _SHARED.findall(maps):
        if not path.startswith(_NO_FILES):
            start = int(low, 16) >> PAGE_SHIFT
            found.append(Mapping((int(high, 16) >> PAGE_SHIFT) - start, pid, start))
    return found


def file_pfns(words: bytes, byteorder: str) -> Iterator[int]:
    """The page frames, below 2 ** 32, of present file pages in words of pagemap, which are in ``byteorder``."""
    halves = array("I", words)
    if byteorder != sys.byteorder:
        halves.byteswap()
    big = byteorder == "big"
    present = (words[0::8] if big else words[7::8]).translate(_FILE_PAGES)
    return itertools.compress(halves[1::2] if big else halves[0::2], present)


class Marks:
    """A byte a page of the guest's memory: 1 where a process has the page mapped.

    Memory that was never marked costs nothing, and all of it goes with this object.
    """

    def __init__(self, pages: int) -> None:
        self.pages = pages
        self._map = mmap.mmap(-1, max(1, pages), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)

    def add(self, pfns: Iterator[int]) -> None:
        """Mark pages; those beyond the guest's memory are none."""
        inside = filter(self.pages.__gt__, pfns)
        deque(map(self._map.__setitem__, inside, itertools.repeat(1)), maxlen=0)

    def part(self, start: int, pages: int) -> bytes:
        """The marks of ``pages`` pages from pfn ``start``; b"" where none is marked."""
        part = self._map[start : start + pages]
        return part if 1 in part else b""


class SharedMappings:
    """Looks for such mappings, a little at a time.

    :param proc: where the kernel shows processes.
    :ivar seconds: what the last look took.
    """

    def __init__(self, proc: str = "/proc") -> None:
        self._proc = proc
        #: In the order they were found; a set that keeps its order.
        self._known: dict[int, None] = {}
        self._left: deque[int] = deque()
        self._bare: set[int] = set()
        self._rounds = 0
        self.seconds = 0.0

    def look(self, pages: int) -> Generator[None, None, Marks | None]:
        """Look again; the pages found mapped, or None where no file is. Gives way every now and then.

        :param pages: of the guest's memory.
        """
        self.seconds = 0.0
        mappings: list[Mapping] = []
        yield from self._paced(self._find(mappings))
        if not mappings:
            return None
        marks = Marks(pages)
        yield from self._paced(self._mark(mappings, marks))
        return marks

    def _paced(self, steps: Iterator[None]) -> Iterator[None]:
        """Take steps until there are none or the time for them is up."""
        spent, begun = 0.0, time.monotonic()
        for _ in steps:
            now = time.monotonic() - begun
            if spent + now > LOOK_SECONDS:
                break
            if now > _STEP_SECONDS:
                spent += now
                yield
                begun = time.monotonic()
        self.seconds += spent + time.monotonic() - begun

    def _find(self, mappings: list[Mapping]) -> Iterator[None]:
        """Collect mappings: of the processes known to have some, then of those whose turn it is."""
        known = dict(self._known)
        for pid in itertools.chain(known, self._turns(known)):
            found = shared_mappings(self._maps(pid), pid)
            if not found:
                self._known.pop(pid, None)
            elif len(self._known) < _KNOWN_MAX:
                self._known[pid] = None
            mappings += found[: _MAPPINGS_MAX - len(mappings)]
            yield

    def _turns(self, known: Collection[int]) -> Iterator[int]:
        """The processes of this round that had no turn yet; those left over have theirs in the next look."""
        if not self._left:
            if self._rounds % _BARE_ROUNDS == 0:
                self._bare.clear()
            self._rounds += 1
            with os.scandir(self._proc) as entries:
                pids = (int(entry.name) for entry in entries if entry.name.isdecimal())
                self._left.extend(pid for pid in itertools.islice(pids, _PROCESSES_MAX) if pid not in self._bare)
        while self._left:
            pid = self._left.popleft()
            if pid not in known:
                yield pid

    def _maps(self, pid: int) -> bytes:
        """The text of a process's maps, b"" if it has none or has gone."""
        text = read_bytes(f"{self._proc}/{pid}/maps", _MAPS_BYTES_MAX)
        if not text:
            self._bare.add(pid)
        return text

    def _mark(self, mappings: list[Mapping], marks: Marks) -> Iterator[None]:
        """Mark the pages in mappings, the smallest first: a huge sparse one hides none of the others."""
        for pages, pid, start in sorted(mappings):
            try:
                descriptor = os.open(f"{self._proc}/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
            except OSError:
                # Gone meanwhile.
                continue
            try:
                stop = start + min(pages, _MAPPING_PAGES_MAX)
                for place in range(start, stop, _PIECE_PAGES):
                    words = os.pread(descriptor, min(_PIECE_PAGES, stop - place) * 8, place * 8)
                    if words != _NOTHING[: len(words)]:
                        marks.add(file_pfns(words[: len(words) & ~7], sys.byteorder))
                    yield
            except OSError:
                continue
            finally:
                os.close(descriptor)
