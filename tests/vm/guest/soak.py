"""The guest's side of a soak: churn, a probe for pauses, and what the host orders on a disk, beside each other.

``soak.py SERIAL SEED`` goes on alone in the background. Its answers (``board.py``) tell how it stands: ``state`` is
"churning", after the order ``end`` "ending", and "done" once every process has verified all it still had. ``problems``
is what was wrong, whoever died meanwhile.
"""

import os
import signal
import sys
import time
from mmap import mmap

from board import PAGE, Board, go_on_alone, signal_agent
from churn import WORKS, child, make_folders, remember
from probe import Pauses, touch_for_ever, zero_pages

PROBLEMS_MAX = 8
PROBLEM_CHARACTERS = 200


class Workers:
    """Processes that work until told to end, with what they did and what they complained of."""

    def __init__(self):
        # Shared with every child: whether to end, then a counter of rounds each.
        self._shared = memoryview(mmap(-1, PAGE)).cast("Q")
        self._names = []
        self._running = {}
        self._complaints, self._complain = os.pipe()
        os.set_blocking(self._complaints, False)
        self.problems = []

    def start(self, name, work):
        self._names.append(name)
        place = len(self._names)

        def going():
            self._shared[place] += 1
            return not self._shared[0]

        pid = os.fork()
        if pid == 0:
            # Behind the guest agent: it is to be there again soon after it died.
            os.nice(19)
            child(work, name, going, os.open(os.devnull, os.O_WRONLY), self._complain)
        self._running[pid] = name

    def end(self):
        self._shared[0] = 1

    def rounds(self):
        return {name: self._shared[place] for place, name in enumerate(self._names, 1)}

    def look(self):
        """Collect complaints and who ended; whether some still work."""
        while self._running:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                break
            name = self._running.pop(pid)
            if status:
                self._problem("%s ended with wait status %d" % (name, status))
            elif not self._shared[0]:
                self._problem("%s ended before it was told to" % name)
        # After the ends: what somebody said on the way out is there by now. Each is one short write, kept whole.
        try:
            for line in os.read(self._complaints, 65536).decode(errors="replace").splitlines():
                self._problem(line)
        except BlockingIOError:
            pass
        return bool(self._running)

    def _problem(self, text):
        if len(self.problems) < PROBLEMS_MAX:
            self.problems.append(text[:PROBLEM_CHARACTERS])


def main(serial, seed):
    remember()
    make_folders()
    board, pauses = Board(serial), Pauses()
    go_on_alone()
    workers = Workers()
    for name, work in WORKS.items():
        workers.start("%s.%s" % (name, seed), work)
    workers.start("probe", lambda _name, going: touch_for_ever(pauses, zero_pages(), going))
    beat, state, signals = 0, "churning", {}
    while state != "done":
        for order, argument in board.orders():
            pauses.order(order)
            if order == "end":
                workers.end()
                state = "ending"
            elif order == "signal" and signal_agent(argument, serving=argument != signal.SIGCONT):
                signals[argument] = signals.get(argument, 0) + 1
        if not workers.look():
            state = "done"
        beat += 1
        board.tell(
            {
                "beat": beat,
                "state": state,
                "problems": workers.problems,
                "rounds": workers.rounds(),
                "signals": signals,
                "pauses": pauses.answer(),
            }
        )
        time.sleep(0.02)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
