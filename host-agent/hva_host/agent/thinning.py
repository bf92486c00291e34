"""A series that goes on for as long as it likes and holds a bounded number of points."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Thinned(Generic[T]):
    """Points in order, at about even distances.

    :param most: points held, even; beyond it every second one goes and the interval doubles.
    :param interval: seconds between points at first.
    :param join: what becomes of a point that stays and the one after it that goes; None: it stays as it is.
    :ivar interval: seconds after which the next point is wanted.
    """

    def __init__(self, most: int, interval: float, join: Callable[[T, T], T] | None = None) -> None:
        self.points: list[T] = []
        self.interval = interval
        self._most = most
        self._join = join

    def add(self, point: T) -> None:
        """Take a point in, thinning out where there are too many."""
        self.points.append(point)
        if len(self.points) > self._most:
            # The newest stays, whatever the parity: a picture must not end early.
            stay, go = self.points[:-1:2], self.points[1:-1:2]
            if self._join is not None:
                stay = list(map(self._join, stay, go))
            self.points = stay + self.points[-1:]
            self.interval *= 2
