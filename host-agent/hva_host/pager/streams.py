"""Sequential readers: where each goes on, and how far ahead of it pages are filled. Arithmetic only.

A reader's window doubles each time it faults where it was expected, as the kernel's own read-ahead does. In the middle
of a long window one page is left out, the *mark* (PG_readahead is the kernel's): its reader faults there, waits for a
single page, and the next window is filled while it goes through the rest of this one. So what is filled for nothing is
at most about one and a half times as much as it has read.
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
#: Windows of fewer pages have no mark: their readers are through before the next could be filled.
_MARKED = 128
_NO_MARK = 1 << 62


class Window(NamedTuple):
    """How far to fill for a fault, in pages: ``now``, before its reader is woken, and in all; 0 in all at a mark."""

    now: int
    pages: int


_ONE_PAGE = Window(_FIRST, _FIRST)
_AT_MARK = Window(1, 0)


@dataclass
class Ahead:
    """Pages ``[next, stop)`` to be filled ahead of a reader whose window is ``window`` pages.

    :ivar mark: the first discarded page from here on is left out; beyond ``stop`` where none is, or has been.
    """

    next: int
    stop: int
    window: int
    mark: int


class _Expected(NamedTuple):
    """A reader is expected at ``pfn`` and gets ``window`` pages then: from there on, or from ``after`` on at a mark."""

    pfn: int
    window: int
    after: int = 0


_NOBODY = _Expected(1 << 62, 0)


class Streams:
    """The readers of one VM that were seen last."""

    def __init__(self) -> None:
        #: By pfn >> _SLACK_SHIFT.
        self._expected: OrderedDict[int, _Expected] = OrderedDict()
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
            expected = self._expected.get(key, _NOBODY)
            if expected.after and expected.pfn == pfn:
                del self._expected[key]
                self._go_on(expected)
                return _AT_MARK
            if expected.pfn <= pfn <= expected.pfn + (1 << _SLACK_SHIFT) and not expected.after:
                del self._expected[key]
                return Window(min(expected.window, AROUND), expected.window)
        return _ONE_PAGE

    def refaulted(self, pfn: int, filled: int, window: int) -> None:
        """A fault on ``pfn`` with this window (:attr:`Window.pages`) was answered with ``filled`` pages."""
        if window > filled:
            self._begin(pfn + filled, pfn + window, window, pfn + window // 2)
        elif window:
            self._expect(pfn + filled, window)

    def ahead(self) -> Ahead | None:
        """What to fill next; to be answered by :meth:`filled`."""
        return self._ahead[0] if self._ahead else None

    def left_out(self, ahead: Ahead, pfn: int) -> None:
        """Instead of being filled, the page at ``ahead``'s mark was left out, and everything before it is resident."""
        self._remember(_Expected(pfn, min(ahead.window * 2, WINDOW_MAX), ahead.stop))
        ahead.mark = _NO_MARK
        self.filled(ahead, pfn + 1)

    def filled(self, ahead: Ahead, until: int) -> None:
        """Everything before pfn ``until`` is resident now; no progress ends this read-ahead. Several take turns."""
        self._ahead.remove(ahead)
        progress, ahead.next = until > ahead.next, until
        if progress and ahead.next < ahead.stop:
            self._ahead.append(ahead)
        else:
            self._end(ahead)

    def _begin(self, start: int, stop: int, window: int, mark: int) -> None:
        if len(self._ahead) == _AHEAD:
            self._end(self._ahead.pop(0))
        self._ahead.append(Ahead(start, stop, window, mark if window >= _MARKED else _NO_MARK))

    def _go_on(self, at: _Expected) -> None:
        """A reader has come to its mark: the window behind the present one is to be filled, and only then."""
        stop, mark = at.after + at.window, at.after + at.window // 2
        # Where the present one ends, nobody faults any more.
        if self._expected.get(at.after >> _SLACK_SHIFT, _NOBODY).pfn == at.after:
            del self._expected[at.after >> _SLACK_SHIFT]
        for ahead in self._ahead:
            if ahead.stop == at.after:
                ahead.stop, ahead.window, ahead.mark = stop, at.window, mark
                return
        self._begin(at.after, stop, at.window, mark)

    def _end(self, ahead: Ahead) -> None:
        self._expect(ahead.next, ahead.window)

    def _expect(self, pfn: int, window: int) -> None:
        self._remember(_Expected(pfn, min(window * 2, WINDOW_MAX)))

    def _remember(self, expected: _Expected) -> None:
        self._expected[expected.pfn >> _SLACK_SHIFT] = expected
        if len(self._expected) > _STREAMS:
            self._expected.popitem(last=False)
