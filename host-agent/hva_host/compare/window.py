"""How a run's memory went down: from when to when that is the method's doing, how far, and how fast. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from hva_host.agent.model import Measure, Sample
from hva_host.compare.model import MethodRun
from hva_host.report.model import StepRecord

#: How close to the least is "there", of it; and what share of memory must go for there to be a way at all.
NEAR = 0.05
#: Verbs at which the guest is at work again, so that what follows is no longer the method's doing alone.
_WORK = ("guest", "load")


@dataclass(frozen=True)
class Fall:
    """The way down. Memory in bytes, times in seconds since the VM started."""

    #: Moments and memory, from when reclaiming began to where the way ends.
    points: tuple[tuple[float, int], ...]
    #: From when seconds are counted.
    since: float
    least: int
    #: Whether anything went that is worth the name.
    fell: bool

    def seconds_to(self, level: float) -> float | None:
        """Seconds until no more than ``level`` bytes were left; None: there always were more."""
        return next((at - self.since for at, size in self.points if at >= self.since and size <= level), None)

    @property
    def seconds_to_least(self) -> float | None:
        """Seconds until all but there; None: nothing went."""
        return self.seconds_to(self.least * (1 + NEAR)) if self.fell else None


def occupied(found: Sample | Measure) -> int:
    """Bytes of the host's memory that backing and store take."""
    return found.backing_bytes + found.store_memory_bytes


def began_at(run: MethodRun) -> float | None:
    """When reclaiming began, in seconds since the VM started; None: the run did not come to that step."""
    timeline = run.report.timeline if run.report is not None else []
    if run.begin.step is None:
        return timeline[0].at_s if timeline else 0.0
    return next((step.at_s for step in _steps(run) if step.number == run.begin.step), None)


def reclaiming(run: MethodRun) -> tuple[float, float] | None:
    """From when to when the host's memory is the method's doing; None: it did not come to that.

    To the guest's next command, or to the end where reclaiming goes on beside commands.
    """
    begin = began_at(run)
    timeline = run.report.timeline if run.report is not None else []
    if begin is None or not timeline:
        return None
    end = timeline[-1].at_s
    if run.begin.beside:
        return begin, end
    works = (step.at_s for step in _steps(run) if step.verb in _WORK and step.at_s is not None)
    return begin, next((at for at in works if at > begin), end)


def fall_of(run: MethodRun) -> Fall | None:
    """How a run's memory went down; None where nothing is known of that.

    The least counts from where memory had fallen at all: before that, a guest that has just booted has least.
    """
    window = reclaiming(run)
    points = _points(run, *window) if window is not None else ()
    if window is None or not points:
        return None
    most, fallen = 0, []
    for at, size in points:
        most = max(most, size)
        if size < most * (1 - NEAR):
            fallen.append((at, size))
    if fallen:
        bottom, least = min(fallen, key=lambda point: point[1])
    else:
        bottom, least = min(points[points.index(_top(points)) :], key=lambda point: point[1])
    # What a step asks for counts from the step. What goes on all the time has no such moment: there, from the most.
    before = [point for point in points if point[0] <= bottom]
    since = _top(before)[0] if run.begin.beside else window[0]
    return Fall(points, since, least, bool(fallen))


def _top(points: list[tuple[float, int]] | tuple[tuple[float, int], ...]) -> tuple[float, int]:
    """The last of those with most memory."""
    return max(reversed(points), key=lambda point: point[1])


def _points(run: MethodRun, begin: float, end: float) -> tuple[tuple[float, int], ...]:
    timeline = run.report.timeline if run.report is not None else []
    # What there was at the beginning: by the next sample it may all have gone.
    first = [sample for sample in timeline if sample.at_s < begin][-1:]
    within = [sample for sample in timeline if begin <= sample.at_s <= end]
    return tuple((max(sample.at_s, begin), occupied(sample)) for sample in (*first, *within))


def _steps(run: MethodRun) -> list[StepRecord]:
    return run.report.steps if run.report is not None else []
