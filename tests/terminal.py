"""A terminal that a command runs in, with somebody at its keyboard: what is on the screen, and what it is left like."""

from __future__ import annotations

import fcntl
import os
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pyte
import pytest

_SECONDS = 60.0
#: The command's own session, with this terminal; then the command.
_START = "import os, sys; os.login_tty(int(sys.argv[1])); os.execv(sys.argv[2], sys.argv[2:])"


class Terminal:
    """A command in a terminal of its own; a context, which kills it."""

    def __init__(
        self, argv: Sequence[str | Path], environment: Mapping[str, str], *, columns: int = 80, lines: int = 24
    ) -> None:
        self._screen = pyte.Screen(columns, lines)
        self._stream = pyte.ByteStream(self._screen)
        #: All that the command has written.
        self.raw = b""
        self._master, slave = os.openpty()
        self.resize(columns, lines)
        #: What the terminal was like before.
        self.before = termios.tcgetattr(self._master)
        self.process = subprocess.Popen(
            [sys.executable, "-c", _START, str(slave), *argv],
            env={"TERM": "xterm-256color", "LANG": "C.UTF-8", **environment},
            pass_fds=[slave],
            stdin=subprocess.DEVNULL,
        )
        os.close(slave)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.process.kill()
        self.process.wait()
        if self._master >= 0:
            os.close(self._master)

    @property
    def lines(self) -> list[str]:
        """What is on the screen, without blanks at the ends of lines."""
        return [line.rstrip() for line in self._screen.display]

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    @property
    def settings(self) -> list[Any]:
        """The terminal's settings (termios)."""
        return termios.tcgetattr(self._master)

    def resize(self, columns: int, lines: int) -> None:
        """Give the terminal another size, of which the command is told."""
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
        self._screen.resize(lines, columns)

    def press(self, keys: str) -> None:
        """Type."""
        os.write(self._master, keys.encode())

    def wait_for(self, text: str, line: int | None = None) -> None:
        """Wait until ``text`` is on the screen, or in that line of it."""
        deadline = time.monotonic() + _SECONDS
        while text not in (self.text if line is None else self.lines[line]):
            if time.monotonic() > deadline:
                pytest.fail(f"{text!r} never on the screen:\n{self.text}")
            if not self._read(0.2) and self.process.poll() is not None:
                pytest.fail(f"the command ended with {self.process.returncode}:\n{self.text}")

    def stopped(self) -> None:
        """Wait until the command is stopped, as Ctrl-Z does it."""
        deadline = time.monotonic() + _SECONDS
        while Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
            assert time.monotonic() < deadline, "it was not stopped"
            self._read(0.1)
        while self._read(0.1):
            pass

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def hang_up(self) -> None:
        """The terminal goes away, as when a connection breaks."""
        os.close(self._master)
        self._master = -1

    def ended(self) -> int:
        """The command's exit code, once it has ended and all it wrote was read."""
        deadline = time.monotonic() + _SECONDS
        while self.process.poll() is None:
            assert time.monotonic() < deadline, f"it goes on:\n{self.text}"
            if self._master < 0:
                time.sleep(0.05)
            else:
                self._read(0.1)
        while self._master >= 0 and self._read(0.1):
            pass
        return self.process.returncode

    def is_as_before(self) -> bool:
        """Has the terminal its settings, its screen and its cursor back?"""
        screen = self.raw.rfind(b"\x1b[?1049l") > self.raw.rfind(b"\x1b[?1049h")
        cursor = self.raw.rfind(b"\x1b[?25h") > self.raw.rfind(b"\x1b[?25l")
        return self.settings == self.before and screen and cursor

    def _read(self, timeout: float) -> bool:
        if not select.select([self._master], [], [], timeout)[0]:
            return False
        try:
            data = os.read(self._master, 1 << 16)
        except OSError:
            # Nobody has the other end open any more (pty(7)).
            return False
        self.raw += data
        self._stream.feed(data)
        return True
