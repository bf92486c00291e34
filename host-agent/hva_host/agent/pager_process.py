"""A VM's pager as the host agent sees it: started, spoken to, watched, started again when it died."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

from hva_host.agent.pager_link import CALL_SECONDS, PagerLink
from hva_host.agent.pager_parent import PagerParent
from hva_host.memory.ledger import LEDGER_NAME, holder
from hva_host.pager.main import PROCESS_NAME
from hva_host.pager.process_files import descriptors
from hvaqemu.errors import HvaError, LaunchError, PeerLost, RefusedError
from hvaqemu.qemu import logs, sockets

PAGER_SOCKET = "pager.sock"
PAGER_LOG = "pager.log"
_ENDS_SECONDS = 5.0
#: One that lost its index reads the whole image before it serves.
_ATTACH_SECONDS = 120.0


class PagerHandle:
    """The pager of one VM. The process outlives us; what is here is our link to it.

    :param parent: forks it.
    :param on_event: gets the pager's events.
    """

    def __init__(self, runtime: Path, parent: PagerParent, on_event: Callable[[str, dict[str, Any]], None]) -> None:
        self._runtime = runtime
        self._parent = parent
        self._on_event = on_event
        self._pidfd = -1
        self._log_before = 0
        self.link = PagerLink(on_event)
        self.pid = 0

    async def start(self, qemu_pid: int, layers: Sequence[tuple[Path, Path]], *, anew: bool = False) -> None:
        """Start a pager for a QEMU and wait until it serves.

        :param layers: image and index of each layer pages may be matched against.
        :param anew: another pager served this QEMU before: a layer that can not be matched against any more must not
            keep this one from serving what depends on it.
        :raise LaunchError: it could not attach; carries its words.
        """
        try:
            await self._fork(qemu_pid, layers)
            forked = self.pid
            await self._greet(_ATTACH_SECONDS)
            if self.pid != forked:
                # One that a parent forked before it died was there first; the other found the ledger locked.
                self._watch()
            for image, index in layers:
                with suppress(RefusedError) if anew else nullcontext():
                    await self.link.call("add-layer", {"path": str(image), "index": str(index)})
        except (HvaError, OSError) as error:
            await self.link.close()
            self.kill()
            said = logs.one_line(logs.tail(self._runtime / PAGER_LOG, since=self._log_before), 1)
            raise LaunchError(said or f"pager: {error}") from error
        except BaseException:
            self.kill()
            raise

    async def _fork(self, qemu_pid: int, layers: Sequence[tuple[Path, Path]]) -> None:
        path = self._runtime / PAGER_SOCKET
        path.unlink(missing_ok=True)
        self._forget()
        log = os.open(self._runtime / PAGER_LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        # What its predecessor died of stays to be read.
        self._log_before = os.fstat(log).st_size
        try:
            with sockets.listen(path) as listener:
                self.pid, self._pidfd = await self._parent.fork(qemu_pid, layers, listener.fileno(), log)
        finally:
            os.close(log)

    async def adopt(self) -> None:
        """Connect to the pager that serves already.

        :raise HvaError: there is none, or it does not answer.
        """
        await self._greet(CALL_SECONDS)
        self._watch()

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
        """End a pager that is of no use. Nothing is lost: another takes over where it stood."""
        if self._pidfd >= 0:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    async def wait_ended(self, timeout: float) -> None:
        """Wait for a pager whose QEMU has ended; it ends by itself. One that does not in time is killed.

        Never raises: nothing depends on a pager without QEMU.
        """
        await asyncio.wait({self.link.lost}, timeout=timeout)
        if self._pidfd >= 0 and not await _ended(self._pidfd, timeout):
            self.kill()
            await _ended(self._pidfd, timeout)

    async def close(self) -> None:
        """Let go of the pager; it goes on."""
        await self.link.close()
        self._forget()

    def _watch(self) -> None:
        self._forget()
        # It may just have died; then its link is lost too.
        with suppress(ProcessLookupError):
            self._pidfd = os.pidfd_open(self.pid)

    def _forget(self) -> None:
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1


async def _ended(pidfd: int, timeout: float) -> bool:
    """Whether a process ends within ``timeout`` seconds. In no thread: others may all hang on a file."""
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    loop.add_reader(pidfd, ended.set)
    try:
        async with asyncio.timeout(timeout):
            await ended.wait()
    except TimeoutError:
        return False
    finally:
        loop.remove_reader(pidfd)
    return True


async def call(handle: PagerHandle, command: str, timeout: float = CALL_SECONDS) -> dict[str, Any]:
    """What a pager returns for a command without arguments.

    :raise HvaError: as :meth:`PagerLink.call`.
    """
    answer = await handle.link.call(command, timeout=timeout)
    if not isinstance(answer, dict):
        raise PeerLost(f"pager {command}: nonsense")
    return answer


async def end_holder(qemu_pid: int) -> None:
    """Kill the pager that has a QEMU's ledger locked, if one has; returns once it has ended, or after some seconds.

    For one that does not answer: nothing is lost, the next goes on where it stood.
    """
    with suppress(OSError, HvaError):
        links = descriptors(qemu_pid)
        number = next((number for number, link in links.items() if link == f"/memfd:{LEDGER_NAME} (deleted)"), None)
        if number is None:
            return
        fd = os.open(f"/proc/{qemu_pid}/fd/{number}", os.O_RDWR | os.O_CLOEXEC)
        try:
            if (pid := holder(fd)) > 0:
                await _end_pager(pid, fd)
        finally:
            os.close(fd)


async def _end_pager(pid: int, ledger: int) -> None:
    pidfd = os.pidfd_open(pid)
    try:
        # With the pidfd in hand: it is the one that holds the lock, and a pager, or it is left alone.
        name = Path(f"/proc/{pid}/comm").read_text().strip()
        if name == PROCESS_NAME and holder(ledger) == pid:
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            await _ended(pidfd, _ENDS_SECONDS)
    finally:
        os.close(pidfd)
