"""Touches pages that the host discards all the time, checks each, and measures how long it was ever kept from doing so.

``probe.py SERIAL`` goes on alone in the background and answers on a disk (``board.py``). Its answer's ``pauses`` are
the newest gaps between two touches (each a number that counts up, when it began, and its length), the longest of all,
and what time it is; all in seconds of the guest's monotonic clock. Between the orders ``rest`` and ``go`` it touches
nothing.
"""

import mmap
import os
import random
import sys
import time
import zlib

from board import PAGE, Board, go_on_alone, signal_agent
from churn import image_files

#: Bytes of files it reads at the most: as much as a small guest comfortably caches.
SIZE = 32 << 20
#: Seconds between rounds, and touches in one. A round must be short: what it takes counts as a gap.
REST = 0.004
TOUCHES = 2
#: Shorter gaps, in seconds, are not told of.
GAP = 0.01


class Pauses:
    """What was measured, in memory that a process and its parent share."""

    _LONGEST, _TOUCHES, _REST, _COUNT, _GAPS = range(5)
    #: The newest gaps that are kept; the host looks oftener than so many can pass.
    KEPT = 32

    def __init__(self):
        self._words = memoryview(mmap.mmap(-1, PAGE)).cast("Q")

    @property
    def resting(self):
        return bool(self._words[self._REST])

    def order(self, order):
        """Do what the host wants, if it is one of ours."""
        if order in ("rest", "go"):
            self._words[self._REST] = order == "rest"

    def gap(self, began, seconds):
        words, spent = self._words, int(seconds * 1e9)
        words[self._TOUCHES] += TOUCHES
        words[self._LONGEST] = max(words[self._LONGEST], spent)
        if seconds >= GAP:
            place = self._GAPS + words[self._COUNT] % self.KEPT * 2
            words[place], words[place + 1] = int(began * 1e9), spent
            # Last: a reader that sees the number sees the gap.
            words[self._COUNT] += 1

    def answer(self):
        words, count = self._words, self._words[self._COUNT]
        gaps = []
        for number in range(max(0, count - self.KEPT // 2), count):
            place = self._GAPS + number % self.KEPT * 2
            gaps.append([number, words[place] / 1e9, words[place + 1] / 1e9])
        return {
            "longest_s": words[self._LONGEST] / 1e9,
            "touches": words[self._TOUCHES],
            "now_s": time.monotonic(),
            "gaps": gaps,
        }


def image_pages():
    """``(mapping, offset, CRC-32)`` of pages of the largest of the image's files: they are discarded as copies."""
    found, size = [], 0
    for path in sorted(image_files(), key=os.path.getsize, reverse=True):
        if size < SIZE:
            with open(path, "rb") as file:
                mapping = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
            offsets = range(0, len(mapping) - PAGE, PAGE)
            found += [(mapping, offset, zlib.crc32(mapping[offset : offset + PAGE])) for offset in offsets]
            size += len(mapping)
    return found


def zero_pages():
    """The same of memory that is all zeros: discarded too, and nothing the guest's kernel ever takes away or reads from
    a disk, so that only the host can keep who touches it waiting."""
    mapping = mmap.mmap(-1, SIZE)
    for offset in range(0, SIZE, PAGE):
        mapping[offset] = 0
    check = zlib.crc32(bytes(PAGE))
    return [(mapping, offset, check) for offset in range(0, SIZE, PAGE)]


def touch_for_ever(pauses, known, going):
    """How many pages are touched, once ``going()`` says no.

    :param known: pages and what is in them, from one of the above.
    :raise SystemExit: a page's bytes were wrong.
    """
    # Ahead of everything else, so that it is only ever kept waiting by what the host does.
    os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(10))
    last = time.monotonic()
    while going():
        while pauses.resting:
            time.sleep(0.01)
            last = time.monotonic()
        for _ in range(TOUCHES):
            mapping, offset, check = random.choice(known)
            if zlib.crc32(mapping[offset : offset + PAGE]) != check:
                raise SystemExit("mismatch: a page of the probe at %d" % offset)
        time.sleep(REST)
        now = time.monotonic()
        pauses.gap(last, now - last - REST)
        last = now
    return len(known)


def main(serial):
    board, pauses = Board(serial), Pauses()
    go_on_alone()
    pid = os.fork()
    if pid == 0:
        try:
            touch_for_ever(pauses, image_pages(), lambda: True)
        finally:
            os._exit(1)
    problems, beat = [], 0
    while True:
        for order, argument in board.orders():
            if order == "signal":
                signal_agent(argument)
            else:
                pauses.order(order)
        ended, status = os.waitpid(pid, os.WNOHANG) if not problems else (0, 0)
        if ended:
            problems.append("the reader ended with wait status %d: a page's bytes were wrong" % status)
        beat += 1
        board.tell({"beat": beat, "problems": problems, "pauses": pauses.answer()})
        time.sleep(0.02)


if __name__ == "__main__":
    main(sys.argv[1])
