"""Signals the guest agent for the host, whoever that agent is by now, makes files, and says on a disk how it is.

``steward.py SERIAL FOLDER`` goes on alone in the background. Its answers (``board.py``) tell the guest agent's process
(``agent``; 0: none), whether that stands still (``stopped``), and how many files are in FOLDER (``armed``).
"""

import os
import sys
import time

from board import Board, agent, go_on_alone, is_agent, signal_agent


def stopped(pid):
    try:
        with open("/proc/%d/stat" % pid, "rb") as file:
            return file.read().rpartition(b")")[2].split()[0] == b"T"
    except OSError:
        return False


def main(serial, folder):
    board = Board(serial)
    go_on_alone()
    pid = 0
    while True:
        for order, argument in board.orders():
            if order == "make":
                open(argument, "x").close()
            # Between two agents the next one is meant.
            while order == "signal" and not signal_agent(argument):
                time.sleep(0.02)
        # Looking at every process, so often, would be most of what this guest does.
        if not is_agent(pid):
            pid = agent()
        board.tell({"agent": pid, "stopped": stopped(pid), "armed": len(os.listdir(folder))})
        time.sleep(0.02)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
