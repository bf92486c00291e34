"""Files that are written, overwritten, cut, punched, deleted and made again, and verified. Run in a guest.

``rewriter.py churn SECONDS FOLDER…`` does so in all folders at once; exit status 1 and a line that begins with
"mismatch:" if any byte is wrong. ``rewriter.py promise FOLDER…`` prints the checksums of files that it has written and
synced there, then goes on writing without end; ``rewriter.py kept FOLDER…`` prints those of the same files now.
"""

import ctypes
import hashlib
import json
import os
import random
import sys
import time

PAGE = 4096
SIZE = 64 * PAGE
FILES = 12
PUNCH = 0x02 | 0x01  # FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
PROMISED = 16

libc = ctypes.CDLL(None, use_errno=True)
libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_longlong, ctypes.c_longlong)


def noise(size):
    """Bytes no other file has, in whole pages, so that each is a page of its own in any layer."""
    return random.getrandbits(8 * size).to_bytes(size, "big") if size else b""


class File:
    """One file and what it must hold."""

    def __init__(self, path):
        self.path = path
        self.data = bytearray()
        self.write()

    def write(self):
        self.data[:] = noise(random.randrange(1, SIZE))
        with open(self.path, "wb") as file:
            file.write(self.data)

    def overwrite(self):
        start = random.randrange(len(self.data) + 1)
        piece = noise(random.randrange(1, 5 * PAGE))
        self.data[start : start + len(piece)] = piece
        with open(self.path, "r+b") as file:
            file.seek(start)
            file.write(piece)

    def cut(self):
        size = random.randrange(SIZE)
        self.data[:] = self.data[:size] + bytes(max(0, size - len(self.data)))
        os.truncate(self.path, size)

    def punch(self):
        start, size = random.randrange(len(self.data) + 1), random.randrange(1, 8 * PAGE)
        end = min(start + size, len(self.data))
        self.data[start:end] = bytes(max(0, end - start))
        with open(self.path, "r+b") as file:
            if libc.fallocate(file.fileno(), PUNCH, start, size):
                raise SystemExit("no holes: " + os.strerror(ctypes.get_errno()))

    def make_again(self):
        os.unlink(self.path)
        self.write()

    def sync(self):
        with open(self.path, "rb") as file:
            os.fsync(file.fileno())

    def forget(self):
        """Have it read from the disk the next time."""
        self.sync()
        with open(self.path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def verify(self):
        with open(self.path, "rb") as file:
            if file.read() != self.data:
                raise SystemExit("mismatch: " + self.path)


def churn(seconds, folder):
    end = time.monotonic() + seconds
    files = [File("%s/rewritten-%d" % (folder, number)) for number in range(FILES)]
    deeds = (File.write, File.overwrite, File.overwrite, File.cut, File.punch, File.make_again, File.sync, File.forget)
    done = 0
    while time.monotonic() < end:
        file = random.choice(files)
        random.choice(deeds)(file)
        random.choice(files).verify()
        done += 1
    for file in files:
        file.forget()
        file.verify()
    print("%s: %d deeds" % (folder, done))


def digest(path):
    with open(path, "rb") as file:
        return hashlib.md5(file.read()).hexdigest()


def promised(folders):
    return ["%s/promised-%d" % (folder, number) for folder in folders for number in range(PROMISED)]


def promise(folders):
    for path in promised(folders):
        with open(path, "wb") as file:
            file.write(noise(random.randrange(1, SIZE)))
            file.flush()
            os.fsync(file.fileno())
    for folder in folders:
        # Their names are to last, too.
        descriptor = os.open(folder, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    print(json.dumps({path: digest(path) for path in promised(folders)}))
    sys.stdout.flush()
    null = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(null, number)
    if os.fork():
        os._exit(0)
    os.setsid()
    while True:
        for folder in folders:
            churn(1.0, folder)


def in_each(folders, work):
    children = []
    for folder in folders:
        pid = os.fork()
        if pid == 0:
            try:
                work(folder)
                sys.stdout.flush()
                os._exit(0)
            except BaseException as error:
                os.write(2, ("%s\n" % (error,)).encode())
                os._exit(1)
        children.append(pid)
    return max(os.waitpid(pid, 0)[1] for pid in children)


def main(words):
    if words[0] == "churn":
        return 1 if in_each(words[2:], lambda folder: churn(float(words[1]), folder)) else 0
    if words[0] == "promise":
        promise(words[1:])
    print(json.dumps({path: digest(path) for path in promised(words[1:])}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
