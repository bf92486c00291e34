"""Who uses the guests' services: a few requests a second to each, every answer checked, from its start to the end."""

from __future__ import annotations

import asyncio
import hashlib
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from hva_host.load.http import Connections
from hvaqemu.errors import HvaError

#: Seconds after which an answer is none.
TIMEOUT = 10.0
_PATHS = [f"/files/{number}" for number in range(256)] + [f"/pages/{number}" for number in range(2000)]


@dataclass(frozen=True)
class Window:
    """What came of the requests that were due in some time.

    :ivar worst: the smallest share of right answers of any one guest.
    """

    due: int
    right: int
    worst: float
    errors: tuple[str, ...]

    @property
    def share(self) -> float:
        """Of all guests together: right answers of those that were due."""
        return self.right / self.due if self.due else 0.0


@dataclass
class _Visitor:
    """Of one guest. Times are of the monotonic clock."""

    connections: Connections
    asked: list[float] = field(default_factory=list)
    answered: list[float] = field(default_factory=list)
    errors: list[tuple[float, str]] = field(default_factory=list)
    requests: set[asyncio.Task[None]] = field(default_factory=set)

    async def run(self, rate: float, seed: int) -> None:
        """Ask on and on; each request has its own time, whatever the others take."""
        draw = random.Random(seed)
        due = time.monotonic()
        while True:
            due += 1 / rate
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            self.asked.append(due)
            task = asyncio.create_task(self._ask(draw.choice(_PATHS), due))
            self.requests.add(task)
            task.add_done_callback(self.requests.discard)

    async def _ask(self, path: str, due: float) -> None:
        try:
            async with asyncio.timeout(TIMEOUT):
                answer = await self.connections.get(path)
        except TimeoutError:
            self.errors.append((due, "no answer in time"))
        except HvaError as error:
            self.errors.append((due, error.message))
        else:
            if answer.status == 200 and answer.digest == hashlib.sha256(answer.body).digest():
                self.answered.append(due)
            else:
                self.errors.append((due, f"wrong answer, status {answer.status}"))


class Visitors:
    """Of all guests.

    :param rate: requests a second to each guest.
    """

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._visitors: list[_Visitor] = []
        self._tasks: list[asyncio.Task[None]] = []

    def begin(self, host: str, port: int) -> None:
        """One more guest is asked from now on."""
        visitor = _Visitor(Connections(host, port))
        self._visitors.append(visitor)
        self._tasks.append(asyncio.create_task(visitor.run(self._rate, len(self._visitors))))

    async def watch(self, seconds: float) -> Window:
        """What comes of the requests of the next ``seconds``; takes as long as an answer may take longer."""
        begin = time.monotonic()
        end = begin + seconds
        await asyncio.sleep(seconds + TIMEOUT)
        due = [_within(visitor.asked, begin, end) for visitor in self._visitors]
        right = [_within(visitor.answered, begin, end) for visitor in self._visitors]
        errors = {why for visitor in self._visitors for at, why in visitor.errors if begin <= at < end}
        worst = min(answered / asked for answered, asked in zip(right, due, strict=True) if asked)
        return Window(sum(due), sum(right), worst, tuple(sorted(errors)))

    async def end(self) -> None:
        """Ask no more."""
        tasks = [*self._tasks, *(task for visitor in self._visitors for task in visitor.requests)]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for visitor in self._visitors:
            await visitor.connections.close()


def _within(times: Sequence[float], begin: float, end: float) -> int:
    return sum(begin <= at < end for at in times)
