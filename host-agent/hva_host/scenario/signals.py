"""SIGINT, SIGTERM and SIGHUP end a run in good order instead of at once."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interruption:
    """What came, if anything: ``name`` of the signal, or ""."""

    def __init__(self, task: asyncio.Task[None]) -> None:
        self.name = ""
        self._task = task

    def end(self) -> None:
        """Cancel what was to end."""
        self._task.cancel()


#: Those that are inside, the innermost last.
_inside: list[Interruption] = []


def _came(number: signal.Signals) -> None:
    innermost = _inside[-1]
    if not innermost.name:
        for each in _inside:
            each.name = each.name or number.name
        innermost.end()


@contextmanager
def interruptible(task: asyncio.Task[None]) -> Iterator[Interruption]:
    """While inside, the first such signal cancels ``task``; later ones are ignored: clean-up is never cut short.

    One inside another is told first, and its task alone is cancelled; the outer one has the name too, and sees to it
    that nothing more is begun. Outside the main thread nothing is caught: only there can handlers be set.
    """
    interruption = Interruption(task)
    if threading.current_thread() is not threading.main_thread():
        yield interruption
        return

    if _inside:
        _inside.append(interruption)
        try:
            yield interruption
        finally:
            _inside.remove(interruption)
        return

    loop = asyncio.get_running_loop()
    before = {number: signal.getsignal(number) for number in ENDING}
    _inside.append(interruption)
    for number in ENDING:
        loop.add_signal_handler(number, _came, number)
    try:
        yield interruption
    finally:
        _inside.remove(interruption)
        for number, handler in before.items():
            loop.remove_signal_handler(number)
            # asyncio resets to the default; asyncio.run's own SIGINT handler must come back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
