"""The host agent's end of the parent that its pagers are forked from (:mod:`hva_host.pager.parent`)."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from hva_host.memory.native import ensure_native
from hva_host.pager.parent import REQUEST_MAX
from hvaqemu.errors import HostError, LaunchError

T = TypeVar("T")

#: Far more than importing everything takes on a loaded machine.
_ANSWER_SECONDS = 20.0
_END_SECONDS = 5.0
_ENVIRONMENT = {
    # No threads for numpy's linear algebra, which pagers do not use: a process with threads must not fork.
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    # What an epoch needs for a moment goes back to the host when it ends (mallopt(3); fixed, it does not grow).
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_TOP_PAD_": "0",
}


class Forked(NamedTuple):
    """A pager's process: its number, and a descriptor (owned by who gets this) that means it and no other."""

    pid: int
    pidfd: int


class PagerParent:
    """Forks pagers; one for all VMs of a host agent. It ends with the host agent, pagers do not."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        #: One request at a time; held in threads.
        self._lock = threading.Lock()
        # Of its own: guests wait for this, and what else runs in threads may hang on a file.
        self._thread = ThreadPoolExecutor(1, "pagers")

    async def prepare(self) -> None:
        """Start it now, so that the first pager needs not wait for it.

        :raise HostError: it can not be started.
        """
        await self._in_thread(self._locked_start)

    async def fork(self, qemu_pid: int, layers: Sequence[tuple[Path, Path]], listener: int, log: int) -> Forked:
        """A new pager for a QEMU; whether it can attach shows on its socket and in its log.

        :param layers: image and index of each layer that pages may depend on.
        :param listener: descriptor of a listening unix socket; ``log``: where its words go. Both stay the caller's.
        :raise LaunchError: it could not be forked.
        :raise HostError: the parent can not be started.
        """
        request = {"pid": qemu_pid, "layers": [[str(image), str(index)] for image, index in layers]}
        # The thread's own: a caller that is cancelled closes its descriptors, and their numbers come to mean others.
        passed = [os.dup(listener), os.dup(log)]
        forking = asyncio.ensure_future(self._in_thread(self._fork, json.dumps(request).encode(), passed))
        try:
            return await asyncio.shield(forking)
        except asyncio.CancelledError:
            forking.add_done_callback(_not_wanted)
            raise

    def close(self) -> None:
        """End it; the pagers go on."""
        with self._lock:
            self._end()

    async def _in_thread(self, work: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, *arguments)

    def _locked_start(self) -> None:
        with self._lock:
            self._start()

    def _start(self) -> socket.socket:
        if self._control is not None and self._process is not None and self._process.poll() is None:
            return self._control
        self._end()
        ensure_native()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            with theirs:
                fd = theirs.fileno()
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "hva_host.pager.parent", "--control", str(fd)],
                    stdin=subprocess.DEVNULL,
                    pass_fds=[fd],
                    env=os.environ | _ENVIRONMENT,
                    start_new_session=True,
                )
        except OSError as error:
            ours.close()
            raise HostError(f"the parent of pagers can not be started: {error.strerror}") from error
        ours.settimeout(_ANSWER_SECONDS)
        self._control = ours
        return ours

    def _end(self) -> None:
        if self._control is not None:
            self._control.close()
            self._control = None
        if self._process is not None:
            try:
                self._process.wait(_END_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None

    def _fork(self, request: bytes, descriptors: list[int]) -> Forked:
        try:
            return self._ask(request, descriptors)
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def _ask(self, request: bytes, descriptors: list[int]) -> Forked:
        with self._lock:
            for attempt in (1, 2):
                control = self._start()
                try:
                    socket.send_fds(control, [request], descriptors)
                    data, received, _, _ = socket.recv_fds(control, REQUEST_MAX, 1)
                    if data:
                        return _forked(json.loads(data), received)
                    why = "it hung up"
                except OSError as error:
                    why = error.strerror or str(error)
                # It was killed, perhaps just now: another will do. Its late answer must not be taken for the next one.
                self._end()
                if attempt == 2:
                    raise LaunchError(f"the parent of pagers does not answer: {why}")
        raise AssertionError("unreachable")


def _not_wanted(forking: asyncio.Future[Forked]) -> None:
    """Who asked for a pager was cancelled before it was there."""
    if not forking.cancelled() and forking.exception() is None:
        pidfd = forking.result().pidfd
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        os.close(pidfd)


def _forked(answer: dict[str, Any], received: list[int]) -> Forked:
    if "error" in answer or not received:
        raise LaunchError(str(answer.get("error", "a pager without a pidfd")))
    return Forked(int(answer["pid"]), received[0])
