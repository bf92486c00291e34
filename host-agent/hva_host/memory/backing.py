"""The backing: the memfd that holds a guest's RAM, used only through its descriptor.

Never through a mapping of ours: reading a hole through ``mmap`` allocates the page and hides its refault, while
``pread`` reads zeros and allocates nothing (seen; mm/shmem.c, shmem_file_read_iter against shmem_fault).
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from hva_host.memory.syscalls import punch_hole
from hvaqemu.pages import PAGE_SHIFT, PAGE_SIZE, Run


class Backing:
    """Guest RAM as a file.

    :param fd: a memfd, open for reading and writing; owned from now on.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.pages = os.fstat(fd).st_size >> PAGE_SHIFT

    def close(self) -> None:
        os.close(self.fd)

    def used_bytes(self) -> int:
        """What the guest's RAM really occupies on the host, swapped pages included (``st_blocks * 512``)."""
        return os.fstat(self.fd).st_blocks * 512

    def read(self, runs: Iterable[Run], into: memoryview) -> int:
        """Read ``runs`` one after the other into the start of ``into``; absent pages read as zeros.

        :return: pages read.
        :raise OSError: EIO when the range is not all inside the file, or what ``preadv`` raises.
        """
        position = 0
        for run in runs:
            end = position + run.pages * PAGE_SIZE
            if os.preadv(self.fd, [into[position:end]], run.start * PAGE_SIZE) != end - position:
                raise OSError(errno.EIO, f"guest RAM ends before page {run.stop}")
            position = end
        return position >> PAGE_SHIFT

    def punch(self, run: Run) -> None:
        """Give the frames of a run back to the host."""
        punch_hole(self.fd, run.start * PAGE_SIZE, run.pages * PAGE_SIZE)

    def present_runs(self, start: int, stop: int) -> Iterator[Run]:
        """The runs of present pages in pfns ``[start, stop)``, swapped ones included.

        ``SEEK_DATA`` rather than ``mincore``, which calls a swapped page absent (mm/mincore.c).
        """
        position, end = start * PAGE_SIZE, stop * PAGE_SIZE
        while position < end:
            try:
                data = os.lseek(self.fd, position, os.SEEK_DATA)
            except OSError as error:
                if error.errno == errno.ENXIO:
                    return
                raise
            if data >= end:
                return
            position = min(os.lseek(self.fd, data, os.SEEK_HOLE), end)
            yield Run(data >> PAGE_SHIFT, (position - data) >> PAGE_SHIFT)

    def presence(self, start: int, stop: int) -> NDArray[np.bool_]:
        """Which of pfns ``[start, stop)`` are present; shape ``(stop - start,)``."""
        present = np.zeros(stop - start, dtype=np.bool_)
        for run in self.present_runs(start, stop):
            present[run.start - start : run.stop - start] = True
        return present
