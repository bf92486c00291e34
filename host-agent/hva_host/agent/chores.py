"""Tasks that go on beside: none of them ends by an exception that nobody hears of."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

log = logging.getLogger(__name__)


class Chores:
    """Tasks of one owner.

    :param owner: what they are logged as being of.
    :ivar failed: told the name of a task that met with a bug, and what it was.
    """

    def __init__(self, owner: str, failed: Callable[[str, BaseException], None]) -> None:
        self._owner = owner
        self.failed = failed
        self._tasks: set[asyncio.Task[None]] = set()

    def begin(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        """Have something done beside; returns at once."""
        task = asyncio.create_task(work, name=f"{self._owner}: {name}")
        self._tasks.add(task)
        task.add_done_callback(lambda done: self._ended(name, done))

    @property
    def busy(self) -> bool:
        """Is something under way?"""
        return bool(self._tasks)

    async def settled(self) -> None:
        """Wait until all have ended."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    async def cancel(self) -> None:
        """End all of them now."""
        for task in self._tasks:
            task.cancel()
        await self.settled()

    def _ended(self, name: str, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("%s: %s ended by a bug", self._owner, name, exc_info=error)
            self.failed(name, error)
