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

    def __init__(self) -> None:
        self.name = ""


@contextmanager
def interruptible(task: asyncio.Task[None]) -> Iterator[Interruption]:
    """While inside, the first such signal cancels ``task``; later ones are ignored: clean-up is never cut short.

    Outside the main thread nothing is caught: only there can handlers be set.
    """
    interruption = Interruption()
    if threading.current_thread() is not threading.main_thread():
        yield interruption
        return

    def came(number: signal.Signals) -> None:
        if not interruption.name:
            interruption.name = number.name
            task.cancel()

    loop = asyncio.get_running_loop()
    before = {number: signal.getsignal(number) for number in ENDING}
    for number in ENDING:
        loop.add_signal_handler(number, came, number)
    try:
        yield interruption
    finally:
        for number, handler in before.items():
            loop.remove_signal_handler(number)
            # asyncio resets to the default; asyncio.run's own SIGINT handler must come back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
