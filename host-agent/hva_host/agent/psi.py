"""Being told by the kernel when processes of the host wait for memory (Documentation/accounting/psi.rst)."""

from __future__ import annotations

import asyncio
import os
import select
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final, Self

PRESSURE_FILE: Final = Path("/proc/pressure/memory")
#: Some process has waited for a tenth of a window. Without CAP_SYS_RESOURCE windows are multiples of 2 s.
_TRIGGER = b"some 200000 2000000"


class PressureTrigger:
    """Calls back, in the event loop, while processes wait for memory. A context; needs a running loop.

    :ivar armed: False where the kernel has no PSI, or allows us no trigger: then nobody calls.
    """

    def __init__(self, pressed: Callable[[], None]) -> None:
        self._pressed = pressed
        self._file = -1
        #: asyncio waits for readability, and the kernel tells of pressure as an exceptional condition: an epoll in
        #: between is readable when that has come.
        self._epoll: select.epoll | None = None

    @property
    def armed(self) -> bool:
        return self._epoll is not None

    def __enter__(self) -> Self:
        with suppress(OSError):
            self._file = os.open(PRESSURE_FILE, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
            os.write(self._file, _TRIGGER)
            self._epoll = select.epoll()
            self._epoll.register(self._file, select.EPOLLPRI)
            asyncio.get_running_loop().add_reader(self._epoll.fileno(), self._ready)
        return self

    def __exit__(self, *_: object) -> None:
        if self._epoll is not None:
            asyncio.get_running_loop().remove_reader(self._epoll.fileno())
            self._epoll.close()
            self._epoll = None
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _ready(self) -> None:
        # Asking is what makes it quiet until the next window.
        if self._epoll is not None and self._epoll.poll(0):
            self._pressed()
