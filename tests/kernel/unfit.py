"""A child process in QEMU's place whose RAM is not fit to be paged, in the ways its arguments name.

Run as a script: ``unfit.py PAGES [WAY…]``; prints its RAM's address and waits for the end of stdin. Ways: ``huge`` (no
``PR_SET_THP_DISABLE``, and RAM touched), ``private``, ``twice`` (mapped in two places), ``part``, ``second`` (another
RAM memfd), ``hugetlb``, ``nobody`` (is another user).
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys

from hva_host.memory.syscalls import userfaultfd

PAGE = 4096
NOBODY = 65534
_PR_SET_DUMPABLE, _PR_SET_THP_DISABLE = 4, 41
_libc = ctypes.CDLL(None, use_errno=True)


def main(pages: int, ways: list[str]) -> None:
    """Be there until stdin ends."""
    if "huge" not in ways:
        _libc.prctl(_PR_SET_THP_DISABLE, 1, 0, 0, 0)
    userfaultfd()
    os.memfd_create("hva-ledger", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.memfd_create("hva-store")
    ram = os.memfd_create("memory-backend-memfd", os.MFD_HUGETLB if "hugetlb" in ways else 0)
    os.ftruncate(ram, pages * PAGE)
    if "second" in ways:
        os.ftruncate(os.memfd_create("memory-backend-memfd"), PAGE)
    size = pages * PAGE // (2 if "part" in ways else 1)
    memory = mmap.mmap(ram, size, flags=mmap.MAP_PRIVATE if "private" in ways else mmap.MAP_SHARED)
    kept = [memory, mmap.mmap(ram, pages * PAGE)] if "twice" in ways else [memory]
    if "huge" in ways:
        memory[:] = bytes(size)
    if "nobody" in ways:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        _libc.prctl(_PR_SET_DUMPABLE, 1, 0, 0, 0)
    print(ctypes.addressof(ctypes.c_char.from_buffer(kept[0])) if "private" not in ways else 0, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
