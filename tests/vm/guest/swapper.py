"""Anonymous memory that does not fit, verified. Run in a guest that swaps.

``swapper.py hold MIB READY GO`` fills memory, reads all of it, makes the file READY, waits for the file GO, and
reads it again. ``swapper.py storm MIB SECONDS`` has several processes write and verify pages in random order, some of
which give parts of their memory back and take it again. Exit status 1 and a line that begins with "mismatch:" if any
byte is wrong.
"""

import mmap
import os
import random
import sys
import time

PAGE = 4096
WORKERS = 3
random.seed(7)
NOISE = random.getrandbits(8 * 16 * PAGE).to_bytes(16 * PAGE, "big")


def content(owner, page, version):
    """A page that is different for every owner, page and version."""
    key = (owner << 48 | page << 24 | version).to_bytes(8, "big")
    start = (page * 7919 + version * 104729) % (15 * PAGE)
    return key + NOISE[start : start + PAGE - 8]


class Memory:
    def __init__(self, owner, pages):
        self.owner = owner
        # Private: of shared memory the kernel keeps no copy in its swap cache.
        self.map = mmap.mmap(-1, pages * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.versions = [0] * pages
        for page in range(pages):
            self.write(page)

    def write(self, page):
        self.versions[page] += 1
        self.map[page * PAGE : (page + 1) * PAGE] = content(self.owner, page, self.versions[page])

    def verify(self, page):
        if self.map[page * PAGE : (page + 1) * PAGE] != content(self.owner, page, self.versions[page]):
            raise SystemExit("mismatch: page %d of %d" % (page, self.owner))

    def verify_all(self):
        for page in range(len(self.versions)):
            self.verify(page)

    def give_back(self, first, count):
        """Its slots of the disk are free for others from then on."""
        self.map.madvise(mmap.MADV_DONTNEED, first * PAGE, count * PAGE)
        for page in range(first, first + count):
            if self.map[page * PAGE : (page + 1) * PAGE] != bytes(PAGE):
                raise SystemExit("mismatch: page %d of %d was given back" % (page, self.owner))
            self.write(page)


def hold(mib, ready, go):
    memory = Memory(1, mib * 256)
    memory.verify_all()
    open(ready, "w").close()
    while not os.path.exists(go):
        time.sleep(0.05)
    memory.verify_all()
    print("%d pages are right" % len(memory.versions))


def storm(owner, pages, seconds):
    random.seed(owner)
    memory, done = Memory(owner, pages), 0
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        first = random.randrange(pages - 64)
        if random.random() < 0.1:
            memory.give_back(first, 64)
        for page in range(first, first + 64):
            memory.verify(page)
            if random.random() < 0.3:
                memory.write(page)
            done += 1
    memory.verify_all()
    print("%d: %d pages" % (owner, done))


def main(words):
    if words[0] == "hold":
        hold(int(words[1]), words[2], words[3])
        return 0
    children = []
    for owner in range(1, WORKERS + 1):
        pid = os.fork()
        if pid == 0:
            try:
                storm(owner, int(words[1]) * 256 // WORKERS, float(words[2]))
                sys.stdout.flush()
                os._exit(0)
            except BaseException as error:
                os.write(2, ("%s\n" % (error,)).encode())
                os._exit(1)
        children.append(pid)
    return 1 if any(os.waitpid(pid, 0)[1] for pid in children) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
