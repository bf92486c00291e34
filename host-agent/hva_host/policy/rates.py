"""How fast a counter grows, over a sliding window."""

from __future__ import annotations

from dataclasses import dataclass

#: A minute, because budgets are per minute: shorter, and a burst that one step made would count as many times itself.
WINDOW_SECONDS = 60.0
#: Before that nothing is said: a few events in a second or two are no rate.
KNOWN_SECONDS = 10.0
#: Points kept at most; looks that come closer together than a window holds are joined.
_POINTS_MAX = 16
_APART_SECONDS = WINDOW_SECONDS / (_POINTS_MAX - 2)


@dataclass(frozen=True, slots=True)
class Window:
    """Points of (seconds, count), oldest first; the first is at or before the window's begin once that is full."""

    points: tuple[tuple[float, float], ...] = ()

    def with_point(self, at_s: float, count: float) -> Window:
        """The same with what was counted at ``at_s``, later than every point; anew where the counter began anew."""
        points = self.points
        if points and count < points[-1][1]:
            points = ()
        if len(points) > 1 and at_s - points[-2][0] < _APART_SECONDS:
            # The last one stays the newest only; what lies between is of no use.
            points = points[:-1]
        keep = 0
        while keep + 1 < len(points) and points[keep + 1][0] <= at_s - WINDOW_SECONDS:
            keep += 1
        return Window((*points[keep:], (at_s, count)))

    @property
    def per_minute(self) -> float | None:
        """Counted in the last minute; None: not known yet.

        Of a window that is not full yet, what it has: a burst that a first step made is not taken for a habit.
        """
        if not self.points:
            return None
        (first_s, first), (last_s, last) = self.points[0], self.points[-1]
        if last_s - first_s < KNOWN_SECONDS:
            return None
        return (last - first) * 60.0 / max(WINDOW_SECONDS, last_s - first_s)


#: Nothing was counted yet.
EMPTY = Window()
