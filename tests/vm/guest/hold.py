"""Holds pages of known kinds and says where in the guest's memory they are.

It returns once they are there and goes on in the background. While it lives, ``/run/hold/ask`` makes it write to
``/run/hold/said``, as JSON, each kind's page frame numbers, the kernel's flags of those pages and the checksum of their
bytes; ``/run/hold/end`` ends it.
"""

import ctypes
import hashlib
import json
import os
import shutil
import sys
import time
from mmap import MAP_ANONYMOUS, MAP_PRIVATE, MAP_SHARED, PROT_READ, PROT_WRITE

PAGE = 4096
PAGES = 64
SIZE = PAGES * PAGE
FOLDER = "/run/hold"
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.mmap.restype = ctypes.c_void_p
libc.mlock.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


def image_files(count):
    """Files of the image, of at least PAGES pages, that nothing here runs."""
    found = []
    for name in sorted(os.listdir("/usr/bin")):
        path = "/usr/bin/" + name
        if os.path.islink(path) or not os.path.isfile(path) or os.path.getsize(path) < SIZE:
            continue
        if not name.startswith(("python", "bash", "dash", "sh", "busybox", "perl", "find", "md5")):
            found.append(path)
    return found[:count]


def read(path):
    with open(path, "rb") as file:
        return file.read(SIZE)


def area(protection, flags, descriptor=-1):
    """Not Python's own mmap: a file that is only mapped to be read must not be copied when it is locked."""
    address = libc.mmap(None, SIZE, protection, flags, descriptor, 0)
    if address == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), "mmap")
    return address


def mapped(path):
    with open(path, "rb") as file:
        address = area(PROT_READ, MAP_SHARED, file.fileno())
    ctypes.string_at(address, SIZE)
    return address


def written(name, data, sync):
    path = "/var/tmp/" + name
    with open(path, "wb") as file:
        file.write(data)
        if sync:
            file.flush()
            os.fsync(file.fileno())
    return mapped(path)


def anonymous(data):
    address = area(PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS)
    ctypes.memmove(address, data, SIZE)
    return address


def lock(address):
    if libc.mlock(address, SIZE):
        raise OSError(ctypes.get_errno(), "mlock")


def words(path, place, count):
    with open(path, "rb", buffering=0) as file:
        data = os.pread(file.fileno(), count * 8, place * 8)
    return [int.from_bytes(data[at : at + 8], sys.byteorder) for at in range(0, len(data), 8)]


def hold():
    clean, locked, copied = image_files(3)
    os.sync()
    areas = {
        "clean": mapped(clean),
        "locked": mapped(locked),
        # On no layer, so nothing can bring it back but the guest's own disk.
        "synced": written("hold.synced", os.urandom(SIZE), True),
        # Their bytes are in the image too: only the guest's word that they matter keeps them.
        "dirty": written("hold.dirty", read(copied), False),
        "anonymous": anonymous(read(copied)),
    }
    lock(areas["locked"])
    lock(areas["anonymous"])
    return areas


def report(areas):
    said = {}
    for kind, address in areas.items():
        # Reading the bytes brings back what is not there, so it comes first.
        digest = hashlib.md5(ctypes.string_at(address, SIZE)).hexdigest()
        entries = words("/proc/self/pagemap", address // PAGE, PAGES)
        pfns = [entry & ((1 << 55) - 1) if entry >> 63 else -1 for entry in entries]
        flags = [words("/proc/kpageflags", pfn, 1)[0] if pfn >= 0 else 0 for pfn in pfns]
        said[kind] = {"sum": digest, "pfns": pfns, "flags": flags}
    with open(FOLDER + "/new", "w") as file:
        json.dump(said, file)
    os.rename(FOLDER + "/new", FOLDER + "/said")


def main():
    os.makedirs(FOLDER)
    # What is dirty stays dirty, and what is locked stays where it is.
    for name, value in (("dirty_writeback_centisecs", 0), ("dirty_expire_centisecs", 360000), ("dirty_ratio", 90),
                        ("dirty_background_ratio", 80), ("compact_unevictable_allowed", 0)):  # fmt: skip
        with open("/proc/sys/vm/" + name, "w") as file:
            file.write(str(value))
    started, tell = os.pipe()
    if os.fork():
        os.close(tell)
        # Its last words, if it did not come far enough to close the pipe on purpose.
        sys.exit(os.read(started, 1) != b"!")
    os.setsid()
    areas = hold()
    os.write(tell, b"!")
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    while not os.path.exists(FOLDER + "/end"):
        if os.path.exists(FOLDER + "/ask"):
            os.unlink(FOLDER + "/ask")
            report(areas)
        time.sleep(0.05)
    shutil.rmtree(FOLDER)


if __name__ == "__main__":
    main()
