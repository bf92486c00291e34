"""A workload that verifies itself. Sent to a guest and run there, with nothing but the standard library.

``churn.py remember`` takes the checksums of files of the image; ``churn.py SECONDS`` then uses memory, files and disk
as hard as it can in several processes. Exit status 1 and a line that begins with "mismatch:" if any byte is wrong.
"""

import hashlib
import json
import mmap
import os
import random
import sys
import time

PAGE = 4096
REMEMBERED = "/run/churn.json"
FOLDER = "/var/tmp/churn"
IMAGE_BYTES = 64 << 20


def pattern(key, pages):
    """Bytes in which every page is different, and different for every key."""
    seed = hashlib.sha256(repr(key).encode()).digest() * (PAGE // 32)
    return b"".join(page.to_bytes(8, "big") + seed[8:] for page in range(pages))


def check(good, what):
    if not good:
        raise SystemExit("mismatch: " + what)


def digest(path, from_disk=False):
    with open(path, "rb") as file:
        if from_disk:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return hashlib.md5(file.read()).hexdigest()


def image_files():
    """Files of the image, the same ones whenever asked, about ``IMAGE_BYTES`` of them."""
    found, size = [], 0
    for top in ("/usr/bin", "/usr/lib"):
        for folder, folders, names in os.walk(top):
            folders.sort()
            for path in sorted(os.path.join(folder, name) for name in names):
                if os.path.isfile(path) and not os.path.islink(path) and size < IMAGE_BYTES:
                    found.append(path)
                    size += os.path.getsize(path)
    return found


def churn_memory(name, end):
    """Blocks of anonymous memory, each of its own size, filled, verified and given back in random order."""
    blocks, made, pages = [], 0, 0
    while time.monotonic() < end:
        key, size = (name, made), random.choice((1, 3, 16, 64, 256))
        block = mmap.mmap(-1, size * PAGE)
        block[:] = pattern(key, size)
        blocks.append((key, block, size))
        made, pages = made + 1, pages + size
        while pages > 6000:
            key, block, size = blocks.pop(random.randrange(len(blocks)))
            check(block[:] == pattern(key, size), "memory block %r" % (key,))
            block.close()
            pages -= size
    for key, block, size in blocks:
        check(block[:] == pattern(key, size), "memory block %r" % (key,))
    return made


def churn_files(name, end):
    """Files written, sometimes synced, verified (sometimes from disk), deleted."""
    files, made = [], 0
    while time.monotonic() < end:
        key, size = (name, made), random.choice((1, 5, 40, 200))
        path = "%s/%s-%d" % (FOLDER, name, made)
        with open(path, "wb") as file:
            file.write(pattern(key, size))
            if made % 4 == 0:
                file.flush()
                os.fsync(file.fileno())
        files.append((key, path, size))
        made += 1
        while len(files) > 40:
            verify_file(*files.pop(random.randrange(len(files))), made % 3 == 0)
    for key, path, size in files:
        verify_file(key, path, size, True)
    return made


def verify_file(key, path, size, from_disk):
    right = hashlib.md5(pattern(key, size)).hexdigest()
    check(digest(path, from_disk) == right, path)
    os.unlink(path)


def reread_image(_name, end):
    """Files of the image, read again and again, from the cache and from disk."""
    with open(REMEMBERED) as file:
        known = json.load(file)
    paths, done = sorted(known), 0
    while time.monotonic() < end:
        path = random.choice(paths)
        check(digest(path, done % 5 == 0) == known[path], path)
        done += 1
    return done


def child(work, name, end, pipe):
    status = 1
    try:
        random.seed(name)
        done = work(name, end)
        os.write(pipe, ("%s: %d\n" % (name, done)).encode())
        status = 0
    except SystemExit as mismatch:
        os.write(2, (str(mismatch) + "\n").encode())
    except BaseException as error:
        os.write(2, ("%s: %r\n" % (name, error)).encode())
    finally:
        os._exit(status)


def main(argument):
    if argument == "remember":
        with open(REMEMBERED, "w") as file:
            json.dump({path: digest(path) for path in image_files()}, file)
        return 0
    os.makedirs(FOLDER, exist_ok=True)
    end = time.monotonic() + float(argument)
    works = [(churn_memory, "memory-a"), (churn_memory, "memory-b"), (churn_files, "files"), (reread_image, "image")]
    children = {}
    for work, name in works:
        pid = os.fork()
        if pid == 0:
            child(work, name, end, 1)
        children[pid] = name
    bad = 0
    while children:
        pid, status = os.wait()
        name = children.pop(pid)
        if status:
            bad = 1
            os.write(2, ("%s ended with wait status %d\n" % (name, status)).encode())
    return bad


sys.exit(main(sys.argv[1]))
