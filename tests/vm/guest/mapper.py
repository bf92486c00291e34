"""Maps a file shared and writable, and writes into it.

``mapper.py FILE PAGES`` returns once it has read the whole mapping, and goes on in the background. Whatever is put into
``/run/mapper/ask`` is done, and what came of it is then in ``/run/mapper/said``, as JSON: ``pfns``: where the mapping's
pages are (-1: not mapped now), without touching them; ``write FIRST``: write until ``/run/mapper/stop`` is there, how
many writes there are by then; ``sums``: checksums of the mapping and of the file; ``end``.

Write number N puts :func:`piece` of N at a place that is a function of N alone, so that a test can do the same.
"""

import hashlib
import json
import mmap
import os
import shutil
import struct
import sys
import time

PAGE = 4096
FOLDER = "/run/mapper"


def piece(number, size):
    data = hashlib.sha256(b"%d" % number).digest()
    page, offset = struct.unpack(">IH", data[:6])
    return page % (size // PAGE) * PAGE + offset % (PAGE - len(data)), data


def pfns(mapping, path):
    """Of each page of the mapping."""
    with open("/proc/self/maps") as file:
        line = next(line for line in file if line.rstrip().endswith(path))
    start = int(line.partition("-")[0], 16)
    with open("/proc/self/pagemap", "rb", buffering=0) as file:
        words = os.pread(file.fileno(), len(mapping) // PAGE * 8, start // PAGE * 8)
    return [word & ((1 << 55) - 1) if word >> 63 else -1 for (word,) in struct.iter_unpack("=Q", words)]


def write(mapping, number):
    while not os.path.exists(FOLDER + "/stop"):
        for each in range(number, number + 20):
            place, data = piece(each, len(mapping))
            mapping[place : place + len(data)] = data
        number += 20
        time.sleep(0.002)
    os.unlink(FOLDER + "/stop")
    return number


def sums(mapping, path):
    with open(path, "rb") as file:
        return {"mapping": hashlib.md5(mapping).hexdigest(), "file": hashlib.md5(file.read()).hexdigest()}


def serve(mapping, path):
    while True:
        if not os.path.exists(FOLDER + "/ask"):
            time.sleep(0.02)
            continue
        with open(FOLDER + "/ask") as file:
            verb, *arguments = file.read().split()
        os.unlink(FOLDER + "/ask")
        if verb == "end":
            return
        if verb == "pfns":
            said = pfns(mapping, path)
        elif verb == "write":
            said = write(mapping, int(arguments[0]))
        else:
            said = sums(mapping, path)
        with open(FOLDER + "/new", "w") as file:
            json.dump(said, file)
        os.rename(FOLDER + "/new", FOLDER + "/said")


def main(path, pages):
    os.makedirs(FOLDER)
    started, tell = os.pipe()
    if os.fork():
        os.close(tell)
        sys.exit(os.read(started, 1) != b"!")
    os.setsid()
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), int(pages) * PAGE) as mapping:
        for place in range(0, len(mapping), PAGE):
            mapping[place]
        os.write(tell, b"!")
        null = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(null, stream)
        serve(mapping, path)
    shutil.rmtree(FOLDER)


main(*sys.argv[1:])
