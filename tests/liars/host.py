"""A process with two guests, for measuring what one that lies costs: ``python -m tests.liars.host LIAR HONEST``.

Both links are asked as epochs ask, the events they cause go where a host agent's go (log and control socket). Four
times a second it prints, as a line of JSON, its CPU seconds, memory, and how the honest guest fared since the line
before.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hva_host.agent.control import CONTROL_SOCKET, ControlServer
from hva_host.agent.event_log import EventLog
from hva_host.agent.guest_link import GuestLink
from hva_host.agent.guest_session import LinkState
from hvaqemu.errors import HvaError
from hvaqemu.pages import PageState, Run
from tests.liars.guest import PAGES

_PING_SECONDS = 0.01
_REPORT_SECONDS = 0.25
_RSS = 1


class Host:
    """The two links and what is known of them."""

    def __init__(self, server: ControlServer) -> None:
        self._server = server
        self._log = EventLog()
        self.events = 0
        self.waits: list[float] = []
        self.scans = 0

    def told(self, name: str) -> Any:
        def on_change(state: LinkState) -> None:
            data = {"name": name, "state": state.value}
            self.events += name == "liar"
            self._log.write("GUEST_AGENT", data, time.monotonic())
            self._server.emit("GUEST_AGENT", data)

        return on_change

    async def ask_liar(self, link: GuestLink) -> None:
        """As the epochs of its VM would, without end."""
        epoch = os.urandom(16)
        while True:
            for question in (
                lambda: link.scan(1.0),
                lambda: link.confirm(epoch, 1, Run(0, PAGES), 1.0),
                lambda: link.stats(1.0),
            ):
                with suppress(HvaError):
                    await question()
                await asyncio.sleep(0.05)

    async def ask_honest(self, link: GuestLink) -> None:
        """Signs of life, and two scans a second."""
        await link.wait_connected(10)
        scanned = time.monotonic()
        while True:
            self.waits.append(await link.ping(30))
            if time.monotonic() - scanned > 0.5:
                scanned = time.monotonic()
                report = await link.scan(30)
                assert report.totals[PageState.UNUSED] == PAGES
                self.scans += 1
            await asyncio.sleep(_PING_SECONDS)

    def report(self, liar: GuestLink) -> dict[str, Any]:
        waits, self.waits = self.waits, []
        rss = int(Path("/proc/self/statm").read_text().split()[_RSS]) * os.sysconf("SC_PAGE_SIZE")
        return {
            "at": time.monotonic(),
            "cpu": time.process_time(),
            "rss": rss,
            "events": self.events,
            "scans": self.scans,
            "waits": waits,
            "state": liar.state.value,
            "counters": asdict(liar.counters),
            "dropped": liar.dropped_bytes,
        }


async def main(liar_socket: str, honest_socket: str) -> None:
    """Until killed."""
    logging.basicConfig(level=logging.INFO)
    server = ControlServer(Path(honest_socket).with_name(CONTROL_SOCKET))
    host = Host(server)
    async with (
        GuestLink(liar_socket, pages=PAGES, on_change=host.told("liar")) as liar,
        GuestLink(honest_socket, pages=PAGES, on_change=host.told("honest")) as honest,
        asyncio.TaskGroup() as group,
    ):
        group.create_task(host.ask_liar(liar))
        group.create_task(host.ask_honest(honest))
        while True:
            await asyncio.sleep(_REPORT_SECONDS)
            print(json.dumps(host.report(liar)), flush=True)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
