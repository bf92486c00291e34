"""Writes over all of its memory again and again, and verifies it each time; signals the guest agent for the host.

``writer.py SERIAL`` goes on alone in the background. Its answers (``board.py``) tell in ``beat`` how often it has
written over everything; that stays 0 once a byte was wrong.
"""

import mmap
import sys
import time

from board import PAGE, Board, go_on_alone, signal_agent

SIZE = 2048 * PAGE


def main(serial):
    board = Board(serial)
    go_on_alone()
    memory = mmap.mmap(-1, SIZE)
    beat, expected, right = 0, bytes(8), True
    while True:
        for order, argument in board.orders():
            if order == "signal":
                signal_agent(argument)
        for at in range(0, SIZE, PAGE):
            right = right and memory[at : at + 8] == expected
        beat += 1
        expected = beat.to_bytes(8, "big")
        for at in range(0, SIZE, PAGE):
            memory[at : at + 8] = expected
        board.tell({"beat": beat if right else 0})
        time.sleep(0.02)


if __name__ == "__main__":
    main(sys.argv[1])
