"""Running a command's coroutine, and ending it in good order when we are told to."""

from __future__ import annotations

import signal
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class Interrupted(BaseException):
    """A signal ended the command, after it has cleaned up."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(number)
        self.number = number


def run_async(work: Coroutine[Any, Any, T]) -> T:
    """What ``work`` returns. SIGINT, SIGTERM and SIGHUP cancel it; then it cleans up.

    :raise Interrupted: one of them did. :raise KeyboardInterrupt: SIGINT did.
    """
    # Not for every command: it takes a third of the time of --help.
    import asyncio

    caught: list[signal.Signals] = []

    async def guarded() -> T:
        task = asyncio.current_task()
        assert task is not None

        def end(number: signal.Signals) -> None:
            caught.append(number)
            task.cancel()

        for number in (signal.SIGTERM, signal.SIGHUP):
            asyncio.get_running_loop().add_signal_handler(number, end, number)
        return await work

    try:
        return asyncio.run(guarded())
    except asyncio.CancelledError:
        if not caught:
            raise
        raise Interrupted(caught[0]) from None
