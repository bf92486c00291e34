"""One QEMU process: started by us or adopted from an earlier host agent, watched through a pidfd, and ended."""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar

from hvaqemu.errors import DeadlineExceeded, HostError, HvaError, LaunchError, PeerLost
from hvaqemu.qemu import logs
from hvaqemu.qemu.race import race

T = TypeVar("T")

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


class QemuLaunchError(LaunchError):
    """QEMU ended before it was of use."""

    def __init__(self, argv: Sequence[str], exit: ExitInfo) -> None:
        said = logs.one_line(exit.log) or "it printed nothing"
        super().__init__(f"{Path(argv[0]).name} {exit.how}: {said}")
        self.argv = tuple(argv)
        self.exit = exit


@dataclass(frozen=True)
class ExitInfo:
    """How a process ended. Both None: it was not our child, so nobody told us."""

    status: int | None
    signal: int | None
    #: The end of what it printed, printable.
    log: str

    @property
    def how(self) -> str:
        """ "exited with status 1", "was killed by SIGKILL", "is gone"."""
        if self.signal is not None:
            return f"was killed by {signal.Signals(self.signal).name}"
        return "is gone" if self.status is None else f"exited with status {self.status}"

    def __str__(self) -> str:
        said = logs.one_line(self.log, 1)
        return f"QEMU {self.how}" + (f": {said}" if said else "")


class StopHow(StrEnum):
    """What it took to end QEMU, from soft to hard."""

    GONE = "it was gone"
    POWERDOWN = "the guest shut down"
    QUIT = "QEMU quit on request"
    TERMINATED = "SIGTERM"
    KILLED = "SIGKILL"


@dataclass(frozen=True)
class StopTimeouts:
    """Seconds to wait at each step before the next; 0 leaves a step out, except the last."""

    powerdown: float = 20.0
    quit: float = 5.0
    terminate: float = 5.0
    kill: float = 20.0


DEFAULT_TIMEOUTS = StopTimeouts()


@dataclass(frozen=True)
class StopReport:
    """How QEMU ended, and why the softer ways did not do."""

    how: StopHow
    exit: ExitInfo
    seconds: float
    complaints: tuple[str, ...] = ()


class Commands(Protocol):
    """What :meth:`QemuProcess.stop` needs of a QMP link."""

    async def execute(
        self, command: str, arguments: Mapping[str, object] | None = None, *, timeout: float = ...
    ) -> object: ...


class QemuProcess:
    """One QEMU. Made by :meth:`spawn` or :meth:`adopt`, inside a running event loop; :meth:`close` lets go of it."""

    def __init__(self, pid: int, start_time: int, pidfd: int, log: Path, child: subprocess.Popen[bytes] | None) -> None:
        self.pid = pid
        #: Clock ticks after boot; with the pid it names a process for ever (proc_pid_stat(5), field 22).
        self.start_time = start_time
        self.log = log
        self._pidfd = pidfd
        self._child = child
        self._loop = asyncio.get_running_loop()
        #: Done once the process has ended.
        self.exited: asyncio.Future[ExitInfo] = self._loop.create_future()
        self._loop.add_reader(pidfd, self._on_exit)

    @classmethod
    def spawn(
        cls,
        argv: Sequence[str],
        *,
        pass_fds: Sequence[int],
        shim: Path,
        log: Path,
        store: int | None = None,
        die_with_parent: bool = False,
    ) -> Self:
        """Start QEMU with the shim preloaded, in a session of its own and a clean environment.

        :param log: gets what QEMU prints; made anew, for its owner only.
        :param store: descriptor of a file for the compressed store; None: the shim makes a memfd.
        :param die_with_parent: QEMU is killed when the calling thread ends; else it outlives us.
        :raise HostError: there is no such program, or it can not be started.
        """
        environment = {
            "PATH": os.environ.get("PATH", os.defpath),
            "LC_ALL": "C",
            "LD_PRELOAD": str(shim),
            "HVA_SHIM": "1",
        }
        if store is not None:
            environment["HVA_SHIM_STORE"] = str(store)
            pass_fds = (*pass_fds, store)
        try:
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise HostError(f"{log}: {error.strerror}") from error
        try:
            child = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environment,
                pass_fds=pass_fds,
                start_new_session=True,
                # What it writes, the console's log above all, is for its owner only.
                umask=0o077,
                preexec_fn=_die_with(os.getpid()) if die_with_parent else None,
            )
        except FileNotFoundError as error:
            raise HostError(f"{argv[0]}: not found", "install the package qemu-system-misc") from error
        except OSError as error:
            raise HostError(f"{argv[0]}: {error.strerror}") from error
        finally:
            os.close(output)
        return cls(child.pid, _start_time(child.pid), os.pidfd_open(child.pid), log, child)

    @classmethod
    def adopt(cls, pid: int, start_time: int, log: Path) -> Self:
        """A QEMU that someone else started.

        :raise PeerLost: that process is gone, whoever has its pid now.
        """
        try:
            pidfd = os.pidfd_open(pid)
        except OSError as error:
            raise PeerLost(f"QEMU, process {pid}, is gone") from error
        # Read after the pidfd was opened: a process that still has the right start time is the one behind the pidfd.
        try:
            found = _start_time(pid)
        except OSError as error:
            os.close(pidfd)
            raise PeerLost(f"QEMU, process {pid}, is gone") from error
        if found != start_time:
            os.close(pidfd)
            raise PeerLost(f"QEMU, process {pid}, is gone; another process has its number")
        return cls(pid, start_time, pidfd, log, None)

    @property
    def alive(self) -> bool:
        return not self.exited.done()

    def _on_exit(self) -> None:
        self._loop.remove_reader(self._pidfd)
        code = None if self._child is None else self._child.wait()
        died = code is not None and code < 0
        self.exited.set_result(
            ExitInfo(
                status=None if died else code,
                signal=-code if code is not None and died else None,
                log=logs.tail(self.log),
            )
        )

    async def wait(self, timeout: float) -> ExitInfo:
        """How the process ended.

        :raise DeadlineExceeded: it did not within ``timeout`` seconds.
        """
        await asyncio.wait({self.exited}, timeout=timeout)
        if not self.exited.done():
            raise DeadlineExceeded(f"QEMU, process {self.pid}, still runs after {timeout:g} s")
        return self.exited.result()

    async def race(self, work: Coroutine[Any, Any, T], timeout: float, what: str) -> T:
        """What ``work`` returns, as long as QEMU lives; see :func:`hvaqemu.qemu.race.race`.

        :raise PeerLost: QEMU ended.
        :raise DeadlineExceeded: the time was over.
        """
        return await race(work, timeout, what, self.exited)

    def send_signal(self, number: signal.Signals) -> None:
        """Signal this very process; nothing if it is gone."""
        if self.alive:
            try:
                signal.pidfd_send_signal(self._pidfd, number)
            except ProcessLookupError:
                return

    async def stop(self, qmp: Commands | None, timeouts: StopTimeouts = StopTimeouts()) -> StopReport:
        """End QEMU: ask the guest, then QEMU, then the kernel. Bounded by the sum of ``timeouts``.

        :param qmp: None where there is no connection; then it begins with SIGTERM.
        :raise DeadlineExceeded: even SIGKILL did not end it (it is stuck in the kernel).
        """
        began = time.monotonic()
        complaints: list[str] = []

        def report(how: StopHow) -> StopReport:
            return StopReport(how, self.exited.result(), time.monotonic() - began, tuple(complaints))

        if not self.alive:
            return report(StopHow.GONE)
        if qmp is not None:
            for how, command, seconds in (
                (StopHow.POWERDOWN, "system_powerdown", timeouts.powerdown),
                (StopHow.QUIT, "quit", timeouts.quit),
            ):
                if seconds > 0 and await self._ask(qmp, command, seconds, complaints):
                    return report(how)
        if timeouts.terminate > 0:
            self.send_signal(signal.SIGTERM)
            if await self._ended(timeouts.terminate, "SIGTERM", complaints):
                return report(StopHow.TERMINATED)
        # A vCPU inside an unanswered fault ends for nothing less.
        self.send_signal(signal.SIGKILL)
        await self.wait(timeouts.kill)
        return report(StopHow.KILLED)

    async def _ask(self, qmp: Commands, command: str, seconds: float, complaints: list[str]) -> bool:
        until = time.monotonic() + seconds
        try:
            if command == "system_powerdown":
                status = await qmp.execute("query-status", timeout=min(seconds, 2.0))
                if isinstance(status, dict) and not status.get("running"):
                    complaints.append(f"{command}: the guest does not run ({status.get('status')})")
                    return False
            await qmp.execute(command, timeout=max(0.0, until - time.monotonic()))
        except HvaError as error:
            complaints.append(str(error))
            # A QEMU that ends hangs up a moment before the kernel tells us; one that lives on did not hear us.
            return await self._ended(min(seconds, 1.0), command, complaints) if isinstance(error, PeerLost) else False
        return await self._ended(max(0.0, until - time.monotonic()), command, complaints)

    async def _ended(self, seconds: float, after: str, complaints: list[str]) -> bool:
        try:
            await self.wait(seconds)
        except DeadlineExceeded:
            complaints.append(f"{after}: QEMU still ran after {seconds:.1f} s")
        return not self.alive

    def close(self) -> None:
        """Let go of the process without ending it. Waiters are told it is out of sight."""
        if self._pidfd >= 0:
            self._loop.remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1
        if not self.exited.done():
            self.exited.set_result(ExitInfo(None, None, ""))
        if self._child is not None and self._child.returncode is None:
            # It goes on without us, on purpose: Popen must not warn of that.
            self._child.returncode = 0


def _start_time(pid: int) -> int:
    """:raise OSError: there is no such process."""
    # The name in parentheses may hold anything, parentheses and blanks too.
    return int(Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[19])


def _die_with(parent: int) -> Callable[[], None]:
    def in_child() -> None:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)

    return in_child
