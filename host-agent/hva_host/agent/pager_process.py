"""A VM's pager as the host agent sees it: started, spoken to, watched, started again when it died."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hva_host.agent.pager_link import CALL_SECONDS, PagerLink
from hva_host.memory.native import ensure_native
from hvaqemu.errors import HvaError, LaunchError, PeerLost
from hvaqemu.qemu import logs, sockets

PAGER_SOCKET = "pager.sock"
PAGER_LOG = "pager.log"
_ATTACH_SECONDS = 20.0


class PagerHandle:
    """The pager of one VM. The process outlives us; what is here is our link to it.

    :param on_event: gets the pager's events.
    """

    def __init__(self, runtime: Path, on_event: Callable[[str, dict[str, Any]], None]) -> None:
        self._runtime = runtime
        self._on_event = on_event
        self._child: subprocess.Popen[bytes] | None = None
        self.link = PagerLink(on_event)
        self.pid = 0

    async def start(self, qemu_pid: int, layers: Sequence[tuple[Path, Path]]) -> None:
        """Start a pager for a QEMU and wait until it serves.

        :param layers: image and index of each layer pages may be matched against.
        :raise LaunchError: it could not attach; carries its words.
        """
        try:
            self._spawn(qemu_pid)
            await self._greet(_ATTACH_SECONDS)
            for image, index in layers:
                await self.link.call("add-layer", {"path": str(image), "index": str(index)})
        except (HvaError, OSError) as error:
            await self.link.close()
            self.kill()
            said = logs.one_line(logs.tail(self._runtime / PAGER_LOG), 1)
            raise LaunchError(said or f"pager: {error}") from error
        except BaseException:
            self.kill()
            raise

    def _spawn(self, qemu_pid: int) -> None:
        ensure_native()
        path = self._runtime / PAGER_SOCKET
        path.unlink(missing_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        log = os.open(self._runtime / PAGER_LOG, flags, 0o600)
        try:
            with sockets.listen(path) as listener:
                fd = listener.fileno()
                self._child = subprocess.Popen(
                    [sys.executable, "-m", "hva_host.pager", "--pid", str(qemu_pid), "--listen", str(fd)],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    pass_fds=[fd],
                    start_new_session=True,
                )
        finally:
            os.close(log)
        self.pid = self._child.pid

    async def adopt(self) -> None:
        """Connect to the pager that serves already.

        :raise HvaError: there is none, or it does not answer.
        """
        await self._greet(CALL_SECONDS)

    async def _greet(self, timeout: float) -> None:
        self.link = PagerLink(self._on_event)
        until = time.monotonic() + timeout
        try:
            await self.link.connect(self._runtime / PAGER_SOCKET, timeout)
            hello = await self.link.call("hello", timeout=max(0.1, until - time.monotonic()))
        except BaseException:
            # Closed is lost: whoever watches the link must not wait for one that never was.
            await self.link.close()
            raise
        self.pid = int(hello["pid"])

    def kill(self) -> None:
        """End a pager we started that is of no use."""
        if self._child is not None and self._child.poll() is None:
            self._child.kill()
            self._child.wait()

    async def wait_ended(self, timeout: float) -> None:
        """Wait for a pager whose QEMU has ended; it ends by itself. One that does not in time is killed.

        Never raises: nothing depends on a pager without QEMU.
        """
        await asyncio.wait({self.link.lost}, timeout=timeout)
        if self._child is None:
            return
        try:
            await asyncio.to_thread(self._child.wait, timeout)
        except subprocess.TimeoutExpired:
            self.kill()

    async def close(self) -> None:
        """Let go of the pager; it goes on."""
        await self.link.close()
        if self._child is not None and self._child.poll() is None:
            # Popen warns of children it still has; this one outlives us on purpose.
            self._child.returncode = 0


async def call(handle: PagerHandle, command: str, timeout: float = CALL_SECONDS) -> dict[str, Any]:
    """What a pager returns for a command without arguments.

    :raise HvaError: as :meth:`PagerLink.call`.
    """
    answer = await handle.link.call(command, timeout=timeout)
    if not isinstance(answer, dict):
        raise PeerLost(f"pager {command}: nonsense")
    return answer
