"""A child process in QEMU's place: it maps a RAM memfd, holds a userfaultfd, and touches pages when told.

Run as a script: ``vcpu.py PAGES [FOLDER]``; with FOLDER its store is a file there. It prints the RAM's address, then
obeys one line at a time on stdin: ``r PFN`` answers the page as hex of its first 8 bytes and a checksum, ``w PFN TEXT``
writes TEXT at its start, ``m PFN PFN…`` reads a byte of each page, one after the other, ``t PFN PFN…`` writes one,
``o PATH`` opens a file for reading and keeps it open, ``p PAGES`` plugs further RAM in.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
import sys
import zlib
from pathlib import Path

from hva_host.memory.store_file import STORE_AT_NAME, STORE_NAME, make_store_file
from hva_host.memory.syscalls import userfaultfd

PAGE = 4096


def store(folder: str, pages: int) -> list[int]:
    """Descriptors as the shim leaves them."""
    if not folder:
        return [os.memfd_create(STORE_NAME)]
    file, where = make_store_file(Path(folder), pages * PAGE), os.memfd_create(STORE_AT_NAME)
    status = os.fstat(file)
    os.write(where, struct.pack("=QQ", status.st_dev, status.st_ino))
    return [file, where]


def main(pages: int, folder: str = "") -> None:
    """Serve until stdin ends."""
    ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE
    kept = [
        userfaultfd(),
        os.memfd_create("hva-ledger", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING),
        *store(folder, pages),
    ]
    ram = os.memfd_create("memory-backend-memfd")
    os.ftruncate(ram, pages * PAGE)
    memory = mmap.mmap(ram, pages * PAGE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    print(address, *kept, ram, flush=True)
    plugged = []
    for line in sys.stdin:
        verb, pfn, *rest = line.split()
        if verb == "o":
            kept.append(os.open(pfn, os.O_RDONLY))
            print("ok", flush=True)
            continue
        if verb == "p":
            more = os.memfd_create("memory-backend-memfd")
            os.ftruncate(more, int(pfn) * PAGE)
            plugged.append(mmap.mmap(more, int(pfn) * PAGE))
            print("ok", flush=True)
            continue
        start = int(pfn) * PAGE
        if verb == "r":
            data = memory[start : start + PAGE]
            print(data[:8].hex(), zlib.crc32(data), flush=True)
        elif verb == "m":
            for number in (pfn, *rest):
                memory[int(number) * PAGE]
            print("ok", flush=True)
        elif verb == "t":
            for number in (pfn, *rest):
                memory[int(number) * PAGE] = 1
            print("ok", flush=True)
        else:
            memory[start : start + len(rest[0])] = rest[0].encode()
            print("ok", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
