"""A workload that verifies itself. Sent to a guest and run there, with nothing but the standard library.

``churn.py remember`` takes the checksums of files of the image; ``churn.py SECONDS`` then uses memory, files and disk
as hard as it can in several processes, until the time is over or ``/run/churn.end`` is there. Exit status 1 and a line
that begins with "mismatch:" if any byte is wrong.
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
END = "/run/churn.end"
FOLDER = "/var/tmp/churn"
#: A tmpfs: its pages are anonymous memory with a name.
MEMORY_FOLDER = "/dev/shm/churn"
ROOT_DISK = "/dev/vda"
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


def mapped_digest(path):
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapping:
        return hashlib.md5(mapping).hexdigest()


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


# Each goes on while ``going()`` says so, which is asked once a round; then it verifies what it still has.


def churn_memory(name, going):
    """Blocks of anonymous memory, each of its own size, filled, verified and given back in random order."""
    blocks, made, pages = [], 0, 0
    while going():
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


def churn_files(name, going, folder=FOLDER):
    """Files written, sometimes synced, verified (sometimes from disk), deleted."""
    files, made = [], 0
    while going():
        key, size = (name, made), random.choice((1, 5, 40, 200))
        path = "%s/%s-%d" % (folder, name, made)
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


def churn_tmpfs(name, going):
    """The same where files are memory."""
    return churn_files(name, going, MEMORY_FOLDER)


def reread_image(_name, going):
    """Files of the image, read again and again: from the cache, through a mapping, and from disk."""
    with open(REMEMBERED) as file:
        known = json.load(file)
    paths, done = sorted(known), 0
    while going():
        path = random.choice(paths)
        if done % 3 == 1 and os.path.getsize(path):
            check(mapped_digest(path) == known[path], "%s (mapped)" % path)
        else:
            check(digest(path, done % 5 == 0) == known[path], path)
        done += 1
    return done


def press_cache(_name, going):
    """Read the root disk in stretches: page cache that nobody needs, and that pushes out what others do."""
    done = 0
    with open(ROOT_DISK, "rb", buffering=0) as disk:
        size = disk.seek(0, os.SEEK_END)
        while going():
            disk.seek(random.randrange(size // PAGE) * PAGE)
            for _ in range(16):
                disk.read(1 << 18)
            done += 1
    return done


WORKS = {
    "memory-a": churn_memory,
    "memory-b": churn_memory,
    "files": churn_files,
    "image": reread_image,
    "tmpfs": churn_tmpfs,
    "cache": press_cache,
}


def make_folders():
    for folder in (FOLDER, MEMORY_FOLDER):
        os.makedirs(folder, exist_ok=True)


def remember():
    with open(REMEMBERED, "w") as file:
        json.dump({path: digest(path) for path in image_files()}, file)


def child(work, name, going, said, complained):
    """In a process of its own: work, and say what came of it."""
    status = 1
    try:
        random.seed(name)
        done = work(name, going)
        os.write(said, ("%s: %d\n" % (name, done)).encode())
        status = 0
    except SystemExit as mismatch:
        os.write(complained, (str(mismatch) + "\n").encode())
    except BaseException as error:
        os.write(complained, ("%s: %r\n" % (name, error)).encode())
    finally:
        os._exit(status)


def main(argument):
    if argument == "remember":
        remember()
        return 0
    make_folders()
    end = time.monotonic() + float(argument)
    children = {}
    for name, work in WORKS.items():
        pid = os.fork()
        if pid == 0:
            child(work, name, lambda: time.monotonic() < end and not os.path.exists(END), 1, 2)
        children[pid] = name
    bad = 0
    while children:
        pid, status = os.wait()
        name = children.pop(pid)
        if status:
            bad = 1
            os.write(2, ("%s ended with wait status %d\n" % (name, status)).encode())
    return bad


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
