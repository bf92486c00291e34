"""The host agent's process: one per runtime directory, which it owns by a lock while it lives."""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from hva_host.agent.bounded_logs import keep_bounded
from hva_host.agent.control import CONTROL_SOCKET, ControlServer
from hva_host.agent.control_commands import CommandTable
from hva_host.agent.event_log import EventLog
from hva_host.agent.fleet import Fleet
from hva_host.agent.fleet_file import FleetFile
from hva_host.agent.journal import Journal
from hva_host.agent.metrics_server import MetricsServer
from hvaqemu.errors import HostError, HvaError, RefusedError
from hvaqemu.fleet_config import MetricsConfig

log = logging.getLogger(__name__)

_LOCK_FILE = "agent.lock"


class AlreadyServed(RefusedError):
    """Another host agent owns the runtime directory."""


class RuntimeLock:
    """Says that this process is the host agent of a runtime directory.

    A lock of fcntl(2): unlike one of flock(2) it is not shared with the processes we start, which outlive us.
    """

    def __init__(self, runtime: Path) -> None:
        """:raise AlreadyServed: another process has it. :raise HostError: the file can not be made."""
        path = runtime / _LOCK_FILE
        try:
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise HostError(f"{path}: {error.strerror}") from error
        try:
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = os.read(self._descriptor, 32).decode(errors="replace").strip()
            os.close(self._descriptor)
            raise AlreadyServed(
                f"{runtime}: a host agent runs already" + (f", process {owner}" if owner.isdigit() else ""),
                "`hvaqemu agent --stop` ends it and leaves its VMs running",
            ) from error
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, f"{os.getpid()}\n".encode(), 0)

    def release(self) -> None:
        """Let another process have it."""
        os.close(self._descriptor)


async def serve(
    runtime: Path,
    ready: Callable[[Path], None],
    log_file: Path | None = None,
    *,
    fleet_file: Path | None = None,
    forget_fleet_file: bool = False,
    metrics: MetricsConfig | None = None,
) -> None:
    """Be the host agent of ``runtime`` until SIGTERM, SIGINT or ``quit``; the VMs go on.

    :param ready: called with the control socket's path once it serves.
    :param log_file: where our standard error goes, if that is a file of ours to keep bounded.
    :param fleet_file: the fleet; None: that of the host agent before us, unless it is to be forgotten. SIGHUP has it
        read again.
    :param metrics: where to serve metrics; None: where the fleet file says, if it does.
    :raise AlreadyServed: another process is.
    :raise HostError: a file or a socket can not be made.
    """
    lock = RuntimeLock(runtime)
    # At once, too: an earlier host agent may have left it long.
    bounding = asyncio.create_task(keep_bounded(log_file), name="agent log") if log_file is not None else None
    try:
        await _serve(runtime, ready, fleet_file, forget_fleet_file, metrics)
    finally:
        if bounding is not None:
            bounding.cancel()
            await asyncio.wait({bounding})
        lock.release()


async def _serve(
    runtime: Path,
    ready: Callable[[Path], None],
    fleet_file: Path | None,
    forget: bool,
    metrics: MetricsConfig | None,
) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    path = runtime / CONTROL_SOCKET
    # Whoever made it is dead: we have the lock.
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise HostError(f"{path}: {error.strerror}", "remove what is in the socket's place") from error
    server = ControlServer(path)
    events, journal = EventLog(), Journal()

    def on_event(event: str, data: dict[str, Any]) -> None:
        now = time.monotonic()
        events.write(event, data, now)
        journal.write(event, data, now)
        server.emit(event, data)

    fleet = Fleet(runtime, on_event=on_event)
    measured = MetricsServer(fleet)
    file = FleetFile(runtime, fleet, on_event)
    if fleet_file is not None:
        file.read(fleet_file)
    elif forget:
        file.forget()
    else:
        file.recall()

    def reload() -> None:
        file.reload()
        if metrics is None:
            measured.move(file.config.metrics)

    def hang_up() -> None:
        # Told of by the file itself.
        with suppress(HvaError):
            reload()

    loop.add_signal_handler(signal.SIGHUP, hang_up)
    # Clients may connect from now on; they are greeted once the VMs are adopted.
    server.listen()
    journal.start()
    try:
        if metrics is not None:
            await measured.start(metrics)
        else:
            measured.move(file.config.metrics)
        await fleet.start()
        await server.start(CommandTable(fleet, server.emit, stop.set, reload))
        file.apply()
        ready(path)
        await stop.wait()
        log.info("ending; the VMs go on")
    finally:
        await file.close()
        await server.close()
        await measured.close()
        await fleet.close()
        await journal.close()
