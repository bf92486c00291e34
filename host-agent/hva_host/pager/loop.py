"""A pager: one loop, one thread, faults first."""

from __future__ import annotations

import os
import select
import socket
import time
from collections.abc import Sequence
from pathlib import Path

from hva_host.pager.attach import attach
from hva_host.pager.beside import Beside
from hva_host.pager.commands import Commands
from hva_host.pager.fetch import Fetcher
from hva_host.pager.refaults import Refaults
from hva_host.pager.sampling import Samples
from hva_host.pager.server import Server
from hva_host.pager.sources import Sources
from hva_host.pager.work import Work
from hvaqemu.errors import PeerLost

_IDLE_SECONDS = 30.0
_BATCHES = 16
#: A poll that took longer than this was woken by what it found; a shorter one found it waiting.
_WOKEN_SECONDS = 20e-6


class Pager:
    """One VM's pager.

    :param pid: the QEMU.
    :param listener: a listening unix socket for host agents.
    :param layers: image and index of each layer that pages may depend on, as the host agent knows them.
    """

    def __init__(self, pid: int, listener: socket.socket, layers: Sequence[tuple[Path, Path]]) -> None:
        """:raise HvaError: it could not attach. :raise ProcessLookupError: no such process."""
        self._pidfd = os.pidfd_open(pid)
        sources = Sources(pid, self._pidfd, layers)
        self._ram = attach(pid, self._pidfd, sources)
        self._fetcher = Fetcher()
        self._work = Work()
        samples = Samples(self._ram.pages)
        self._refaults = Refaults(self._ram, self._work.leave, self._fetcher, samples.came_back)
        self._reading_ahead = False
        self._poller = select.epoll()
        self._beside = Beside()
        for fd in (self._ram.uffd.fd, self._pidfd, self._fetcher.fd, self._beside.fd):
            self._poller.register(fd, select.EPOLLIN)
        self._server = Server(listener, self._poller, lambda client: self._commands.gone(client))
        self._commands = Commands(
            pid, self._ram, self._refaults, samples, self._fetcher, self._beside, self._work, self._server, sources
        )

    def run(self) -> None:
        """Serve until QEMU ends.

        :raise PeerLost: QEMU is gone.
        """
        quiet_since = time.monotonic()
        retry_at: float | None = None
        while True:
            polled_at = time.monotonic()
            events = self._poller.poll(self._timeout(polled_at, retry_at))
            now = time.monotonic()
            ready_at = now if now - polled_at > _WOKEN_SECONDS else quiet_since
            others = []
            for fd, event in events:
                if fd == self._ram.uffd.fd:
                    self._answer_faults(ready_at)
                else:
                    others.append((fd, event))
            quiet_since = time.monotonic()
            for fd, event in others:
                if fd == self._pidfd:
                    raise PeerLost("QEMU has ended")
                self._handle(fd, event)
            retry_at = self._refaults.retry(time.monotonic())
            self._reading_ahead = self._refaults.read_ahead()
            self._work.advance()
            self._commands.announce()

    def _timeout(self, now: float, retry_at: float | None) -> float:
        if self._reading_ahead:
            return 0.0
        times = (self._work.wanted_at(), self._commands.wanted_at(), retry_at, now + _IDLE_SECONDS)
        return max(0.0, min(when for when in times if when is not None) - now)

    def _answer_faults(self, ready_at: float) -> None:
        # Bounded, so that a guest that faults without end does not keep epochs from their deadline.
        for _ in range(_BATCHES):
            faults = self._ram.uffd.read()
            if not faults:
                return
            self._refaults.answer(faults, ready_at)
            ready_at = time.monotonic()

    def _handle(self, fd: int, event: int) -> None:
        if fd == self._fetcher.fd:
            for result in self._fetcher.results():
                self._refaults.fetched(result)
        elif fd == self._beside.fd:
            self._beside.finish()
        elif self._server.owns(fd):
            for client, message, payload in self._server.handle(fd, event):
                self._commands.execute(client, message, payload)
