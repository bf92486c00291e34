"""A terminal that a command has to itself: another screen, keys as they are pressed, all as it was afterwards."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import termios
import tty
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Self

from rich.console import Console, RenderableType
from rich.control import Control
from rich.screen import Screen

#: What terminals send for keys without a character of their own, in both of their modes (xterm's ctlseqs).
_SEQUENCES = {b"\x1b[A": "up", b"\x1bOA": "up", b"\x1b[B": "down", b"\x1bOB": "down"}
_LONGEST = 16


def is_usable() -> bool:
    """Can there be a live screen? Not in a pipe, and not on a terminal that can only print."""
    return sys.stdin.isatty() and sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb"


def keys(data: bytes) -> Iterator[str]:
    """The keys in what a terminal sent: characters, and names of some others. What is not known is passed over."""
    while data:
        if data.startswith((b"\x1b[", b"\x1bO")):
            # A sequence ends with a letter or "~" (ECMA-48, final bytes).
            end = next((at + 1 for at in range(2, min(len(data), _LONGEST)) if 0x40 <= data[at] <= 0x7E), len(data))
            if (name := _SEQUENCES.get(data[:end])) is not None:
                yield name
            data = data[end:]
        else:
            if 0x20 < data[0] < 0x7F:
                yield chr(data[0])
            data = data[1:]


class Terminal:
    """Ours while the context is open. Ctrl-Z gives it back for as long as we are stopped.

    :param on_key: called in the event loop with each key; "" says that the terminal is gone.
    :param redraw: called when what is on the screen must be drawn again.
    """

    def __init__(self, console: Console, on_key: Callable[[str], None], redraw: Callable[[], None]) -> None:
        self._console = console
        self._on_key = on_key
        self._redraw = redraw
        self._before: list[object] | None = None

    def __enter__(self) -> Self:
        loop = asyncio.get_running_loop()
        self._take()
        try:
            loop.add_reader(sys.stdin.fileno(), self._readable)
            loop.add_signal_handler(signal.SIGTSTP, self._suspend)
            loop.add_signal_handler(signal.SIGWINCH, self._redraw)
        except BaseException:
            self._give_back()
            raise
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        loop = asyncio.get_running_loop()
        loop.remove_reader(sys.stdin.fileno())
        for number in (signal.SIGTSTP, signal.SIGWINCH):
            loop.remove_signal_handler(number)
        self._give_back()

    def show(self, *parts: RenderableType) -> None:
        """Fill the screen; what does not fit is cut."""
        self._console.control(Control.home())
        self._console.print(Screen(*parts), end="")

    def _take(self) -> None:
        descriptor = sys.stdin.fileno()
        self._before = termios.tcgetattr(descriptor)
        # Ctrl-C and Ctrl-Z still are signals.
        tty.setcbreak(descriptor)
        changed = termios.tcgetattr(descriptor)
        # Ctrl-\ would end us at once, and leave the terminal as it is now.
        changed[6][termios.VQUIT] = b"\0"
        termios.tcsetattr(descriptor, termios.TCSANOW, changed)
        self._console.set_alt_screen(True)
        self._console.show_cursor(False)

    def _give_back(self) -> None:
        before, self._before = self._before, None
        if before is None:
            return
        # A terminal that has hung up has nothing to be restored.
        with contextlib.suppress(OSError):
            self._console.show_cursor(True)
            self._console.set_alt_screen(False)
        with contextlib.suppress(OSError, termios.error):
            termios.tcsetattr(sys.stdin.fileno(), termios.TCSADRAIN, before)  # type: ignore[arg-type]

    def _suspend(self) -> None:
        self._give_back()
        os.kill(os.getpid(), signal.SIGSTOP)
        # Here we go on once somebody says so.
        self._take()
        self._redraw()

    def _readable(self) -> None:
        try:
            data = os.read(sys.stdin.fileno(), 1024)
        except OSError:
            data = b""
        if not data:
            asyncio.get_running_loop().remove_reader(sys.stdin.fileno())
            self._on_key("")
        for key in keys(data):
            self._on_key(key)
