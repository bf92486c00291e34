"""Why nothing of a VM is being discarded: reasons by source, and word of every change."""

from __future__ import annotations

import enum
from collections.abc import Callable

from hvaqemu.errors import RefusedError


class Source(enum.StrEnum):
    """Where a reason was found; each has at most one at a time."""

    #: In what QEMU says of itself.
    QEMU = "qemu"
    #: In what /proc says of QEMU's process.
    PROCESS = "process"
    #: In what an operator has us tell QEMU.
    MONITOR = "monitor"
    LAYERS = "layers"


class Refusals:
    """The reasons of one VM.

    :param changed: told the whole of :attr:`text` whenever it becomes another, "" where nothing is refused any more.
    """

    def __init__(self, changed: Callable[[str], None]) -> None:
        self._changed = changed
        self._reasons: dict[Source, str] = {}

    @property
    def text(self) -> str:
        """All reasons as one line, or ""."""
        return "; ".join(self._reasons[source] for source in Source if source in self._reasons)

    def set(self, source: Source, reason: str) -> None:
        """What ``source`` says now; "": nothing any more."""
        before = self.text
        if reason:
            self._reasons[source] = reason
        else:
            self._reasons.pop(source, None)
        if self.text != before:
            self._changed(self.text)

    def check(self, *sources: Source) -> None:
        """See that none of ``sources`` (none named: nobody) has a reason.

        :raise RefusedError: one has; says all that is known.
        """
        if any(source in self._reasons for source in sources or Source):
            raise RefusedError(f"nothing is discarded: {self.text}")
