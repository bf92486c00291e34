"""Sequential readers: where each goes on, and how far ahead of it pages are filled. Arithmetic only.

A reader's window doubles each time it faults where it was expected, as the kernel's own read-ahead does, so that what
is filled for nothing is at most as much as it has read.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import NamedTuple

#: The longest window in pages (2 MiB): more than a reader gets through while the pager fills the next run.
WINDOW_MAX = 512
#: Pages filled before who waits is woken, and at a time ahead of it: a reader takes longer to read so many than the
#: pager to fill as many more. One that caught up all the same spends more time being woken than reading: it gets more.
AROUND = 32
AROUND_MAX = 64
_FIRST = 1
_STREAMS = 16
#: A reader passes over up to so many resident pages, seen by nobody, and is still the same reader.
_SLACK_SHIFT = 5
_AHEAD = 4


class Window(NamedTuple):
    """How far to fill for a fault, in pages: ``now``, before its reader is woken, and in all."""

    now: int
    pages: int


_ONE_PAGE = Window(_FIRST, _FIRST)
_NOBODY = (1 << 62, 0)


@dataclass
class Ahead:
    """Pages ``[next, stop)`` to be filled ahead of a reader whose window is ``window`` pages."""

    next: int
    stop: int
    window: int


class Streams:
    """The readers of one VM that were seen last."""

    def __init__(self) -> None:
        #: By pfn >> _SLACK_SHIFT: the pfn a reader is expected at, and its window.
        self._expected: OrderedDict[int, tuple[int, int]] = OrderedDict()
        self._ahead: list[Ahead] = []

    @property
    def reading_ahead(self) -> bool:
        """Is there anything to fill ahead?"""
        return bool(self._ahead)

    def window(self, pfn: int) -> Window:
        """How far to fill for a fault on ``pfn``: one page where nobody was expected."""
        for ahead in self._ahead:
            if ahead.next <= pfn < ahead.stop:
                # The reader is faster than we are: go on from where it is.
                self._ahead.remove(ahead)
                return Window(min(ahead.window, AROUND_MAX), ahead.window)
        near = pfn >> _SLACK_SHIFT
        for key in (near, near - 1):
            expected, pages = self._expected.get(key, _NOBODY)
            if expected <= pfn <= expected + (1 << _SLACK_SHIFT):
                del self._expected[key]
                return Window(min(pages, AROUND), pages)
        return _ONE_PAGE

    def refaulted(self, pfn: int, filled: int, window: int) -> None:
        """A fault on ``pfn`` with this window was answered with ``filled`` pages."""
        if window > filled:
            if len(self._ahead) == _AHEAD:
                self._end(self._ahead.pop(0))
            self._ahead.append(Ahead(pfn + filled, pfn + window, window))
        else:
            self._expect(pfn + filled, window)

    def ahead(self) -> Ahead | None:
        """What to fill next; to be answered by :meth:`filled`."""
        return self._ahead[0] if self._ahead else None

    def filled(self, ahead: Ahead, until: int) -> None:
        """Everything before pfn ``until`` is resident now; no progress ends this read-ahead. Several take turns."""
        self._ahead.remove(ahead)
        progress, ahead.next = until > ahead.next, until
        if progress and ahead.next < ahead.stop:
            self._ahead.append(ahead)
        else:
            self._end(ahead)

    def _end(self, ahead: Ahead) -> None:
        self._expect(ahead.next, ahead.window)

    def _expect(self, pfn: int, window: int) -> None:
        self._expected[pfn >> _SLACK_SHIFT] = (pfn, min(window * 2, WINDOW_MAX))
        if len(self._expected) > _STREAMS:
            self._expected.popitem(last=False)
