"""Signals the guest agent for the host, whoever that agent is by now, and says on a disk how it is.

``steward.py SERIAL FOLDER`` goes on in the background. The disk's first block holds the number of the newest order and
a signal; the second is where it answers: the newest order carried out, the guest agent's process (0: none), the letter
of its state, and how many files are in FOLDER.
"""

import mmap
import os
import struct
import sys
import time

PAGE = 4096
ORDER = struct.Struct(">QQ")
ANSWER = struct.Struct(">QQcB")


def disk(serial):
    for name in os.listdir("/sys/block"):
        try:
            with open("/sys/block/%s/serial" % name) as file:
                if file.read().strip() == serial:
                    return "/dev/" + name
        except OSError:
            continue
    sys.exit("no disk %s" % serial)


def agent():
    """The agent's process and its state."""
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open("/proc/%s/cmdline" % name, "rb") as file:
                    if b"/usr/lib/hva/agent.pyz" not in file.read().split(b"\0"):
                        continue
                with open("/proc/%s/stat" % name, "rb") as file:
                    return int(name), file.read().rpartition(b")")[2].split()[0]
            except OSError:
                continue
    return 0, b"-"


def main(serial, path):
    # Past the page cache, which would show the first order for ever.
    descriptor = os.open(disk(serial), os.O_RDWR | os.O_DIRECT | os.O_SYNC)
    if os.fork():
        return
    os.setsid()
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    block = mmap.mmap(-1, PAGE)
    done = 0
    while True:
        os.preadv(descriptor, [block], 0)
        number, order = ORDER.unpack_from(block)
        pid, state = agent()
        if number != done and pid:
            os.kill(pid, order)
            done = number
        block[: ANSWER.size] = ANSWER.pack(done, pid, state, len(os.listdir(path)))
        os.pwritev(descriptor, [block], PAGE)
        time.sleep(0.02)


main(sys.argv[1], sys.argv[2])
