"""Waiting for a peer: never longer than a deadline, never for one that is gone."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any, TypeVar

from hvaqemu.errors import DeadlineExceeded, PeerLost
from hvaqemu.units import format_duration

T = TypeVar("T")


async def race(work: Coroutine[Any, Any, T], timeout: float, what: str, *gone: asyncio.Future[Any]) -> T:
    """What ``work`` returns, unless one of ``gone`` is done or ``timeout`` seconds pass before; then it is cancelled.

    :param what: names the wait in the error, for example "QMP cont".
    :raise PeerLost: one of ``gone`` was done first; its result says how.
    :raise DeadlineExceeded: the time was over first.
    """
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait({task, *gone}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        for peer in gone:
            if peer.done():
                raise PeerLost(f"{what}: {peer.result()}")
        raise DeadlineExceeded(f"{what}: no answer within {format_duration(timeout)}")
    finally:
        if not task.done():
            task.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await task
