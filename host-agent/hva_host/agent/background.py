"""Finding the host agent of a runtime directory, or starting one in the background."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path
from typing import IO

from hva_host.agent.client import ControlClient, NotServed
from hva_host.agent.control import CONTROL_SOCKET
from hvaqemu.errors import DeadlineExceeded, HostError, LaunchError, PeerLost
from hvaqemu.qemu import logs

LOG_FILE = "agent.log"
#: What a host agent in the background writes to its standard output, once.
READY, TAKEN = b"ready\n", b"taken\n"

#: Bytes of log kept from earlier host agents.
_LOG_MAX = 1 << 20
#: Environment variables whose value may be a path relative to a folder that the host agent leaves.
_PLACES = ("HVAQEMU_RUNTIME_DIR", "HVAQEMU_STATE_DIR", "HVAQEMU_CACHE_DIR", "HVAQEMU_APT_SOURCES")


async def connect_or_start(runtime: Path, timeout: float = 30.0) -> ControlClient:
    """A connection to the host agent of ``runtime``, which is started where none runs, and goes on afterwards.

    Several may do this at once: one of them starts it, all are connected to it.

    :raise LaunchError: it ended at once; carries the end of its log.
    :raise DeadlineExceeded: it did not get ready in time.
    """
    loop = asyncio.get_running_loop()
    until = loop.time() + timeout
    path = runtime / CONTROL_SOCKET
    while True:
        left = max(0.1, until - loop.time())
        try:
            return await ControlClient.connect(path, left)
        except NotServed:
            pass
        except PeerLost:
            # It was about to end when we came.
            if loop.time() >= until:
                raise
        if loop.time() >= until:
            raise DeadlineExceeded(f"{path}: the host agent is not ready after {timeout:g} s", f"see {_log(runtime)}")
        if await _start(runtime, left) == TAKEN:
            # Somebody else's is between taking the lock and listening, or ending: neither sends us an event.
            await asyncio.sleep(0.05)


def _log(runtime: Path) -> Path:
    return runtime / LOG_FILE


async def _start(runtime: Path, timeout: float) -> bytes:
    """Start a host agent and wait until it is ``READY``, or finds the place ``TAKEN``: which of them.

    :raise LaunchError: it ended without a word.
    :raise DeadlineExceeded: it said nothing in time, and was ended.
    """
    path = _log(runtime)
    try:
        log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise HostError(f"{path}: {error.strerror}") from error
    try:
        if os.fstat(log).st_size > _LOG_MAX:
            os.ftruncate(log, 0)
        began = os.fstat(log).st_size
        process = _spawn(runtime, log)
    finally:
        os.close(log)
    assert process.stdout is not None
    word = b""
    try:
        word = await _first_line(process.stdout, timeout)
    except TimeoutError as error:
        raise DeadlineExceeded(f"the host agent is not ready after {timeout:.0f} s", f"see {path}") from error
    finally:
        process.stdout.close()
        if word == READY:
            # It goes on without us, on purpose: Popen must not warn of that.
            process.returncode = 0
        else:
            # It closes its end of the pipe only by ending.
            if not word:
                process.kill()
            process.wait(10.0)
    if word in (READY, TAKEN):
        return word
    said = logs.one_line(_since(path, began)) or "it said nothing"
    raise LaunchError(f"the host agent could not be started: {said.removeprefix('hvaqemu: ')}")


def _spawn(runtime: Path, log: int) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "HVAQEMU_RUNTIME_DIR": str(runtime)}
    environment |= {name: str(Path(environment[name]).absolute()) for name in _PLACES if environment.get(name)}
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "hva_host.cli.main", "agent", "--background"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=log,
        cwd="/",
        env=environment,
        start_new_session=True,
        bufsize=0,
    )


async def _first_line(pipe: IO[bytes], timeout: float) -> bytes:
    """:raise TimeoutError: none came in time."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    async with asyncio.timeout(timeout):
        transport, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), pipe)
        try:
            return await reader.readline()
        finally:
            transport.close()


def _since(path: Path, offset: int) -> str:
    """What the log has got since it was ``offset`` bytes long, printable."""
    try:
        with path.open("rb") as file:
            file.seek(offset)
            return logs.printable(file.read(1 << 16).decode(errors="replace")).strip()
    except OSError:
        return ""
