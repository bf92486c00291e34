"""Sends requests each at its own time, and checks every byte of the answers."""

from __future__ import annotations

import asyncio
import hashlib
import math
import random
import time
from collections import Counter

from hva_host.load.http import Connections
from hva_host.load.model import LoadOrder, LoadReport, LoadResult, percentile
from hvaqemu.errors import DeadlineExceeded, HvaError, PeerLost

#: Each load draws the same paths in the same order.
_SEED = 1
_RETRY_SECONDS = 0.1


class Sender:
    """One load."""

    def __init__(self, order: LoadOrder) -> None:
        self._order = order
        self._connections = Connections(order.host, order.port)
        self._known = dict(order.known)
        self._requests: set[asyncio.Task[None]] = set()
        self._latencies: list[float] = []
        self._late: list[float] = []
        self._errors: Counter[str] = Counter()
        self._right = self._bytes = 0
        self._began = 0.0

    async def wait_ready(self) -> None:
        """Wait until the service answers at all.

        :raise DeadlineExceeded: it does not.
        """
        why = "it says nothing"
        try:
            async with asyncio.timeout(self._order.ready):
                while True:
                    try:
                        await self._connections.get(self._order.paths[0])
                        return
                    except PeerLost as error:
                        why = error.message
                    await asyncio.sleep(_RETRY_SECONDS)
        except TimeoutError as error:
            where = f"{self._order.host}:{self._order.port}"
            raise DeadlineExceeded(
                f"the service at {where} did not answer in {self._order.ready:g} s: {why}"
            ) from error

    async def run(self, stop: asyncio.Event) -> LoadReport:
        """Send until ``stop``, then wait for the last answers."""
        draw = random.Random(_SEED)
        loop = asyncio.get_running_loop()
        stopped = asyncio.ensure_future(stop.wait())
        self._began = time.monotonic()
        number, end = 0, math.inf
        while True:
            due = self._began + number / self._order.rate
            delay = due - time.monotonic()
            if delay > 0 and end == math.inf:
                await asyncio.wait({stopped}, timeout=delay)
            if stop.is_set():
                # All that were due by then are still sent: those left out would be the late ones.
                end = min(end, time.monotonic())
                if due > end:
                    break
            # A sender that was held up itself sends at once all that is due; others are to run in between.
            await asyncio.sleep(0)
            self._late.append(max(0.0, time.monotonic() - due))
            task = loop.create_task(self._request(draw.choice(self._order.paths), due))
            self._requests.add(task)
            task.add_done_callback(self._requests.discard)
            number += 1
        seconds = end - self._began
        if self._requests:
            await asyncio.wait(set(self._requests))
        await self._connections.close()
        return LoadReport(result=self._result(number, seconds), known=self._known)

    async def _request(self, path: str, due: float) -> None:
        error = ""
        try:
            async with asyncio.timeout(due + self._order.timeout - time.monotonic()):
                answer = await self._connections.get(path)
            digest = hashlib.sha256(answer.body).digest()
            if answer.status != 200:
                error = f"status {answer.status}"
            elif answer.digest not in (None, digest) or self._known.setdefault(path, digest.hex()) != digest.hex():
                error = "wrong bytes"
            self._bytes += len(answer.body)
        except TimeoutError:
            error = "no answer in time"
        except HvaError as failure:
            error = failure.message
        if error:
            self._errors[error] += 1
            self._latencies.append(self._order.timeout)
        else:
            self._right += 1
            self._latencies.append(time.monotonic() - due)

    def _result(self, requests: int, seconds: float) -> LoadResult:
        ordered = sorted(self._latencies)
        return LoadResult(
            rate=self._order.rate,
            seconds=seconds,
            requests=requests,
            right=self._right,
            bytes=self._bytes,
            p50_s=percentile(ordered, 0.5),
            p99_s=percentile(ordered, 0.99),
            p999_s=percentile(ordered, 0.999),
            longest_s=ordered[-1] if ordered else 0.0,
            sent_late_p99_s=percentile(sorted(self._late), 0.99),
            errors=dict(self._errors),
        )
