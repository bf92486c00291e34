"""The process that sends a load, as its parent sees it."""

from __future__ import annotations

import asyncio
import sys
from contextlib import suppress
from typing import Self

from pydantic import ValidationError

from hva_host.load.model import LoadOrder, LoadReport
from hvaqemu.errors import DeadlineExceeded, HostError, PeerLost

#: Beyond the deadlines of what it does itself.
_GRACE_SECONDS = 15.0
#: Bytes of a report, most of them checksums.
_REPORT_MAX = 16 << 20


class LoadProcess:
    """A load under way. Made by :meth:`start`; ended by :meth:`stop`, or by :meth:`kill`."""

    def __init__(self, process: asyncio.subprocess.Process, order: LoadOrder) -> None:
        self._process = process
        self._order = order

    @classmethod
    async def start(cls, order: LoadOrder) -> Self:
        """Begin once the service answers.

        :raise DeadlineExceeded: it does not.
        :raise HostError: no process can be started.
        """
        try:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "hva_host.load"),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                # A Ctrl-C is for us; it ends with its standard input.
                start_new_session=True,
                limit=_REPORT_MAX,
            )
        except OSError as error:
            raise HostError(f"the load can not be started: {error.strerror}") from error
        load = cls(process, order)
        try:
            assert process.stdin is not None
            process.stdin.write(order.model_dump_json().encode() + b"\n")
            said = await load._line(order.ready)
            if said.startswith("!"):
                raise DeadlineExceeded(said[1:])
        except BaseException:
            await load.kill()
            raise
        return load

    async def stop(self) -> LoadReport:
        """End it, and wait for the last answers; what came of it.

        :raise PeerLost: the process has ended before.
        """
        try:
            assert self._process.stdin is not None
            self._process.stdin.close()
            return LoadReport.model_validate_json(await self._line(self._order.timeout))
        except ValidationError as error:
            raise PeerLost("the process that sends the load said what it should not") from error
        finally:
            await self.kill()

    async def kill(self) -> None:
        """End it at once; nothing, if it has ended."""
        with suppress(ProcessLookupError):
            self._process.kill()
        await self._process.wait()

    async def _line(self, seconds: float) -> str:
        assert self._process.stdout is not None
        try:
            async with asyncio.timeout(seconds + _GRACE_SECONDS):
                line = await self._process.stdout.readline()
        except TimeoutError as error:
            raise DeadlineExceeded("the process that sends the load does not answer") from error
        if not line:
            raise PeerLost("the process that sends the load has ended")
        return line.decode().strip()
