"""Serves metrics to Prometheus, on a loopback port or a unix socket.

Only as much of HTTP/1 as a GET of one resource takes. However many ask however often, the VMs are looked at once a
second at most, and what is waited for is bounded: connections, the size of a request, and the time for each.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest

from hva_host.agent import accounts
from hva_host.agent.metrics import FleetCollector, Snapshot
from hva_host.agent.model import VmStatus
from hvaqemu.errors import HostError, HvaError
from hvaqemu.fleet_config import MetricsConfig
from hvaqemu.qemu import sockets

log = logging.getLogger(__name__)

CONNECTIONS_MAX = 16
_REQUEST_MAX = 8192
_REQUEST_SECONDS = 5.0
_WRITE_SECONDS = 10.0
#: For how long an answer is good.
_FRESH_SECONDS = 1.0
#: A VM that takes longer is left out; Prometheus itself waits ten seconds, if not told otherwise.
_VM_SECONDS = 4.0


class MeasuredVm(Protocol):
    """What metrics need of a VM."""

    @property
    def name(self) -> str: ...
    async def status(self) -> VmStatus: ...


class MeasuredFleet(Protocol):
    """What metrics need of the fleet."""

    def vms(self) -> Sequence[MeasuredVm]: ...


async def look(fleet: MeasuredFleet) -> Snapshot:
    """All VMs at one moment; one that does not answer keeps nobody waiting for long."""
    began = time.monotonic()
    vms = fleet.vms()
    found = await asyncio.gather(*(_status(vm) for vm in vms))
    return Snapshot(
        vms=[status for status in found if status is not None],
        silent=[vm.name for vm, status in zip(vms, found, strict=True) if status is None],
        agent_memory_bytes=accounts.all_memory(os.getpid()),
        agent_cpu_s=accounts.cpu_seconds(os.getpid()),
        seconds=time.monotonic() - began,
    )


async def _status(vm: MeasuredVm) -> VmStatus | None:
    with suppress(HvaError, TimeoutError):
        async with asyncio.timeout(_VM_SECONDS):
            return await vm.status()
    return None


class MetricsServer:
    """Answers GET /metrics from :meth:`start` to :meth:`close`."""

    def __init__(self, fleet: MeasuredFleet) -> None:
        self._fleet = fleet
        self._server: asyncio.AbstractServer | None = None
        self._where: MetricsConfig | None = None
        self._moving: asyncio.Task[None] | None = None
        self._text: asyncio.Task[bytes] | None = None
        self._made_at = 0.0
        self._connections: set[asyncio.Task[None]] = set()

    async def start(self, where: MetricsConfig) -> None:
        """Listen.

        :raise HostError: the address or path can not be had.
        """
        if where.path is not None:
            try:
                _remove_stale(where.path)
            except OSError as error:
                raise HostError(f"metrics: {where.listen}: {error.strerror}", "choose another path") from error
            listener = sockets.listen(where.path)
            self._server = await asyncio.start_unix_server(self._serve, sock=listener, limit=_REQUEST_MAX)
        else:
            assert where.address is not None
            host, port = where.address
            try:
                self._server = await asyncio.start_server(self._serve, host, port, limit=_REQUEST_MAX)
            except (socket.gaierror, UnicodeError) as error:
                raise HostError(f"metrics: {where.listen}: no such host", "choose another address") from error
            except OSError as error:
                raise HostError(f"metrics: {where.listen}: {error.strerror}", "choose another address") from error
        self._where = where

    def move(self, where: MetricsConfig | None) -> None:
        """Listen there from now on, or nowhere; returns at once. What can not be had is logged."""
        if self._moving is not None:
            self._moving.cancel()
        self._moving = asyncio.create_task(self._move(where), name="metrics server")

    async def close(self) -> None:
        """Stop listening; who is being served is hung up on."""
        if self._moving is not None:
            self._moving.cancel()
            await asyncio.wait({self._moving})
        self._stop_listening()
        tasks = {*self._connections, *([self._text] if self._text is not None else [])}
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def _move(self, where: MetricsConfig | None) -> None:
        if where == self._where:
            return
        self._stop_listening()
        if where is not None:
            try:
                await self.start(where)
                log.info("metrics at %s", where.listen)
            except HostError as error:
                log.error("%s", error)

    def _stop_listening(self) -> None:
        if self._server is None or self._where is None:
            return
        self._server.close()
        self._server = None
        if self._where.path is not None:
            with suppress(OSError):
                self._where.path.unlink(missing_ok=True)
        self._where = None

    async def text(self) -> bytes:
        """The metrics, not older than a second."""
        now = time.monotonic()
        if self._text is None or (self._text.done() and now - self._made_at >= _FRESH_SECONDS):
            self._text = asyncio.create_task(self._make(), name="metrics")
        return await asyncio.shield(self._text)

    async def _make(self) -> bytes:
        try:
            collector = FleetCollector(await look(self._fleet))
            # For a thousand VMs it takes a good part of a second.
            return await asyncio.to_thread(generate_latest, collector)
        finally:
            self._made_at = time.monotonic()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        try:
            if len(self._connections) < CONNECTIONS_MAX:
                self._connections.add(task)
                await self._converse(reader, writer)
        except (OSError, TimeoutError, EOFError, asyncio.LimitOverrunError, asyncio.CancelledError):
            # Who asked went, was too slow or said too much; or we end. The stream machinery would log it.
            pass
        except Exception:
            log.exception("while serving metrics")
        finally:
            self._connections.discard(task)
            writer.close()

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async with asyncio.timeout(_REQUEST_SECONDS):
            head = await reader.readuntil(b"\r\n\r\n")
        method, _, rest = head.partition(b"\r\n")[0].decode("latin-1").partition(" ")
        path = rest.partition(" ")[0].partition("?")[0]
        if method not in ("GET", "HEAD"):
            status, body = "405 Method Not Allowed", b"only GET\n"
        elif path != "/metrics":
            status, body = "404 Not Found", b"metrics are at /metrics\n"
        else:
            status, body = "200 OK", await self.text()
        kind = CONTENT_TYPE_PLAIN_0_0_4 if status.startswith("200") else "text/plain; charset=utf-8"
        lines = (f"HTTP/1.1 {status}", f"Content-Type: {kind}", f"Content-Length: {len(body)}", "Connection: close")
        writer.write("\r\n".join((*lines, "", "")).encode() + (b"" if method == "HEAD" else body))
        async with asyncio.timeout(_WRITE_SECONDS):
            await writer.drain()
            writer.close()
            await writer.wait_closed()


def _remove_stale(path: Path) -> None:
    """Remove a socket that nobody listens on any more; what else is at its path stays, and is complained of."""
    with suppress(FileNotFoundError), socket.socket(socket.AF_UNIX) as probe:
        if not path.is_socket():
            return
        try:
            with sockets.address_of(path) as address:
                probe.connect(address)
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
