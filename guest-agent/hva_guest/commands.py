"""Commands the host runs in the guest: a process group each, output streamed, ended by exit, timeout or the session."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import time
from typing import Callable

from hvaqemu.faultpoints import reach
from hvaqemu.protocol import OUTPUT_BYTES_MAX, Ending, Error, ErrorCode, Exec, ExecEnd, ExecOutput, Message, Stream

COMMANDS_MAX = 8
#: Seconds of silence for which output is awaited of what a command left in the background holding its pipes.
LINGER = 1.0
ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    "LANG": "C.UTF-8",
    # Bytecode written on first import would change the very trees whose checksums a user compares.
    "PYTHONDONTWRITEBYTECODE": "1",
}


class _Command:
    """One running command and its pipes."""

    def __init__(self, request: Exec) -> None:
        """:raise OSError, ValueError: it cannot be started."""
        self.request = request.request
        self.process = subprocess.Popen(
            list(request.argv),
            stdin=subprocess.PIPE if request.stdin else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            cwd="/",
            env=ENVIRONMENT,
        )
        assert self.process.stdout is not None and self.process.stderr is not None
        self.outputs = {self.process.stdout.fileno(): Stream.STDOUT, self.process.stderr.fileno(): Stream.STDERR}
        self.input = request.stdin
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            if pipe is not None:
                os.set_blocking(pipe.fileno(), False)
        self.deadline = time.monotonic() + request.timeout_ms / 1000 if request.timeout_ms else None
        self.timed_out = False
        #: When the last output came, or the process ended.
        self.last_sign = time.monotonic()

    def kill(self) -> None:
        """Kill the whole group, as long as its leader is ours to name: a reaped pid may be somebody else's."""
        if self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)

    def ending(self) -> ExecEnd:
        status = self.process.returncode
        ending = Ending.EXITED if status >= 0 else Ending.SIGNALED
        return ExecEnd(self.request, ending, abs(status), int(self.timed_out), "")


class Commands:
    """All running commands; their pipes are watched by the caller's selector, whose ``data`` is what to call."""

    def __init__(self, selector: selectors.BaseSelector, send: Callable[[Message], None]) -> None:
        self._selector = selector
        self._send = send
        self._running: dict[int, _Command] = {}
        self._paused = False
        #: Killed and not yet reaped.
        self._killed: list[subprocess.Popen[bytes]] = []

    def __len__(self) -> int:
        return len(self._running)

    def start(self, request: Exec) -> None:
        """Run what ``request`` says; whatever comes of it is sent."""
        if request.request in self._running:
            return self._send(Error(request.request, ErrorCode.BAD_REQUEST, "this request is already running"))
        if len(self._running) >= COMMANDS_MAX:
            return self._send(Error(request.request, ErrorCode.BUSY, f"{COMMANDS_MAX} commands are running already"))
        if not request.argv:
            return self._send(Error(request.request, ErrorCode.BAD_REQUEST, "no command given"))
        try:
            command = _Command(request)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            return self._send(ExecEnd(request.request, Ending.NOT_STARTED, 0, 0, reason))
        self._running[request.request] = command
        reach("guest.executing")
        if not self._paused:
            self._watch_outputs(command)
        if command.process.stdin is not None:
            pipe = command.process.stdin.fileno()
            self._selector.register(pipe, selectors.EVENT_WRITE, lambda: self._feed(command))
        return None

    def cancel(self, request: int) -> None:
        """Kill a command, or stop waiting for the output of what it left behind."""
        command = self._running.get(request)
        if command is None:
            return
        command.kill()
        if command.process.returncode is not None:
            command.deadline = time.monotonic()

    def end_all(self) -> None:
        """Kill all commands and forget them: nobody is left to be told."""
        for command in list(self._running.values()):
            command.kill()
            self._close(command)
            self._killed.append(command.process)

    def pause(self, paused: bool) -> None:
        """Stop or go on reading output, so that a command that writes faster than the link carries has to wait."""
        if paused == self._paused:
            return
        self._paused = paused
        for command in self._running.values():
            if paused:
                for pipe in command.outputs:
                    self._selector.unregister(pipe)
            else:
                command.last_sign = time.monotonic()
                self._watch_outputs(command)

    def tick(self) -> float | None:
        """Enforce timeouts, notice ends; seconds until this has to be called again, None: when a process ends."""
        now = time.monotonic()
        self._killed = [process for process in self._killed if process.poll() is None]
        waits = [self._advance(command, now) for command in list(self._running.values())]
        due = [wait for wait in waits if wait is not None]
        return min(due) if due else None

    def _advance(self, command: _Command, now: float) -> float | None:
        """The same for one command."""
        was_running = command.process.returncode is None
        overdue = command.deadline is not None and now >= command.deadline
        if command.process.poll() is None:
            if overdue and not command.timed_out:
                command.timed_out = True
                command.kill()
            return None if command.deadline is None else max(command.deadline - now, 0.1)
        if was_running:
            command.last_sign = now
        silence = command.last_sign + LINGER - now
        if not command.outputs or overdue or (silence <= 0 and not self._paused):
            self._close(command)
            self._send(command.ending())
            return None
        return max(silence, 0.1)

    def _watch_outputs(self, command: _Command) -> None:
        for pipe in command.outputs:
            self._selector.register(pipe, selectors.EVENT_READ, lambda pipe=pipe: self._drain(command, pipe))

    def _drain(self, command: _Command, pipe: int) -> None:
        try:
            data = os.read(pipe, OUTPUT_BYTES_MAX)
        except BlockingIOError:
            return
        if data:
            command.last_sign = time.monotonic()
            self._send(ExecOutput(command.request, command.outputs[pipe], data))
        else:
            self._selector.unregister(pipe)
            del command.outputs[pipe]

    def _feed(self, command: _Command) -> None:
        stdin = command.process.stdin
        assert stdin is not None
        try:
            command.input = command.input[os.write(stdin.fileno(), command.input) :]
        except BlockingIOError:
            return
        except BrokenPipeError:
            command.input = b""
        if not command.input:
            self._selector.unregister(stdin.fileno())
            stdin.close()

    def _close(self, command: _Command) -> None:
        """Let go of a command's pipes and forget it."""
        if not self._paused:
            for pipe in command.outputs:
                self._selector.unregister(pipe)
        stdin = command.process.stdin
        if stdin is not None and not stdin.closed:
            self._selector.unregister(stdin.fileno())
        for stream in (stdin, command.process.stdout, command.process.stderr):
            if stream is not None:
                stream.close()
        del self._running[command.request]
