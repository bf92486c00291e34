"""A raw disk as a letter box between the host and a program in the guest; needs no guest agent.

The first block is the host's, the second the guest's. Each holds the length and the CRC-32 of a JSON text, then that
text. A block caught half written has the wrong sum and is read again.
"""

import json
import mmap
import os
import signal
import struct
import sys
import zlib

PAGE = 4096
HEAD = struct.Struct(">II")
#: As init starts it (/usr/lib/hva/run-agent); its own words have no path before them.
AGENT = b"/usr/lib/hva/agent.pyz"


def find_disk(serial):
    for name in os.listdir("/sys/block"):
        try:
            with open("/sys/block/%s/serial" % name) as file:
                if file.read().strip() == serial:
                    return "/dev/" + name
        except OSError:
            continue
    sys.exit("no disk %s" % serial)


class Board:
    """The guest's end. The host writes ``[[number, order, argument], ...]``, of which those not yet done count."""

    def __init__(self, serial):
        # Past the page cache, which would show the first order for ever.
        self._disk = os.open(find_disk(serial), os.O_RDWR | os.O_DIRECT | os.O_SYNC)
        self._block = mmap.mmap(-1, PAGE)
        self.done = 0

    def orders(self):
        """Orders not yet carried out, oldest first; each only once."""
        os.preadv(self._disk, [self._block], 0)
        length, check = HEAD.unpack_from(self._block)
        text = self._block[HEAD.size : HEAD.size + length]
        if not length or zlib.crc32(text) != check:
            return
        for number, order, argument in json.loads(text):
            if number > self.done:
                self.done = number
                yield order, argument

    def tell(self, answer):
        """Show the host ``answer``, a dict, and which orders are done."""
        text = json.dumps(dict(answer, done=self.done)).encode()
        assert len(text) <= PAGE - HEAD.size, "too long for a block"
        self._block[: HEAD.size + len(text)] = HEAD.pack(len(text), zlib.crc32(text)) + text
        os.pwritev(self._disk, [self._block], PAGE)


def is_agent(pid):
    try:
        with open("/proc/%s/cmdline" % pid, "rb") as file:
            return AGENT in file.read().split(b"\0")
    except OSError:
        return False


def agent(serving=False):
    """The guest agent's process; 0: there is none.

    :param serving: only if it has come as far as to open its port.
    """
    for name in filter(str.isdigit, os.listdir("/proc")):
        if not is_agent(name):
            continue
        folder = "/proc/%s/fd/" % name
        try:
            if not serving or any(os.readlink(folder + each).startswith("/dev/vport") for each in os.listdir(folder)):
                return int(name)
        except OSError:
            continue
    return 0


def signal_agent(number, serving=False):
    """Send the guest agent a signal; whether there was one to send it to."""
    pid = agent(serving)
    try:
        if pid:
            os.kill(pid, number)
    except ProcessLookupError:
        return False
    return pid != 0


def go_on_alone():
    """Leave the guest agent's session and pipes; returns in a process that outlives both."""
    if os.fork():
        os._exit(0)
    os.setsid()
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
