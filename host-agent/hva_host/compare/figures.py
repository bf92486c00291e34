"""The figures by which methods are compared, from their runs. Pure arithmetic; None is "not known"."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from hva_host.agent.model import Measure, Record
from hva_host.compare.method import Method
from hva_host.compare.model import CpuSeconds, GuestCounters, MethodRun
from hva_host.compare.window import NEAR, began_at, fall_of, occupied
from hva_host.load.model import LoadResult
from hva_host.report.model import Outcome, ScenarioReport


class GuestTime(Record):
    """How long a command of the scenario took in the guest."""

    title: str
    seconds: float


class Level(Record):
    """A size that every method's way is timed to."""

    bytes: int
    #: Where it comes from, in a few words.
    why: str


class EndFigures(Record):
    """What there was at the end of the steps, all of one moment. Bytes, and counts since the VM started."""

    backing_bytes: int
    store_bytes: int
    qemu_bytes: int
    pager_bytes: int
    agent_bytes: int
    #: What of the layers the host's page cache held; it may drop that.
    layer_cached_bytes: int
    #: Faults at discarded pages, answered with content from a layer or the store, and with zeros.
    content_refaults: int
    zero_refaults: int
    #: Faults at pages that had never been touched, or that QEMU discarded.
    first_touches: int


class Figures(Record):
    """One method's. "Memory" is backing and compressed store together, bytes."""

    #: Seconds from the guest's first answer to the end of the steps.
    seconds: float | None
    #: At each measure of the scenario, by its name; the second what of the first is the store's.
    memory: dict[str, int]
    store: dict[str, int]
    guest_free: dict[str, int]
    #: Least while that was the method's doing, and from the start of reclaiming until within 5 % of it; None: less than
    #: 5 % went at all.
    least_bytes: int | None
    seconds_to_least: float | None
    #: The same until a size that is the same for all; None: it never came to that.
    seconds_to_level: float | None
    #: The least that the guest had free and available from the reclaim on.
    least_free_bytes: int | None
    least_available_bytes: int | None
    counters: GuestCounters | None
    oom_kills: int | None
    oom_kills_at_least: bool
    #: Commands in the guest that ended well, in order; and the sum of those from the reclaim on against the same under
    #: none. None: not the same ones.
    guest_times: list[GuestTime]
    slowdown: float | None
    #: What came of loads on services in the guest, by their names.
    loads: dict[str, LoadResult]
    #: How long vCPUs waited for answers to faults, in all and at the 99th percentile.
    waited_s: float
    wait_p99_s: float
    #: What the steps took, and of a core, because runs are not equally long.
    cpu: CpuSeconds | None
    cpu_share: float | None
    end: EndFigures | None


class Compared(NamedTuple):
    """The figures of all runs, in their order; None where a VM could not be launched."""

    level: Level | None
    figures: list[Figures | None]


def compared(runs: Sequence[MethodRun]) -> Compared:
    """The figures of each run."""
    level, none = common_level(runs), _of(runs, Method.NONE)
    return Compared(level, [_figures_of(run, none, level) for run in runs])


def common_level(runs: Sequence[MethodRun]) -> Level | None:
    """What all are timed to; None: there is no such size.

    What the balloon came to is what a host has without hva, so it is the size to beat. Without a balloon that took
    anything: half of what a guest holds of which nothing is taken.
    """
    balloon, none = _of(runs, Method.BALLOON), _of(runs, Method.NONE)
    if balloon is not None and not balloon.broken:
        fall = fall_of(balloon)
        if fall is not None and fall.fell:
            return Level(bytes=round(fall.least * (1 + NEAR)), why="the balloon's least + 5 %")
    fall = fall_of(none) if none is not None else None
    if fall is None:
        return None
    began = next((size for at, size in fall.points if at >= fall.since), fall.least)
    return Level(bytes=began // 2, why="half of none's")


def _figures_of(run: MethodRun, none: MethodRun | None, level: Level | None) -> Figures | None:
    report = run.report
    if report is None:
        return None
    fall, begin = fall_of(run), began_at(run)
    later = [point for point in run.guest if begin is not None and point.at_s >= begin]
    cpu, seconds = _cpu(run), _seconds(run)
    return Figures(
        seconds=seconds,
        memory={name: occupied(each) for name, each in report.measures.items()},
        store={name: each.store_memory_bytes for name, each in report.measures.items()},
        guest_free={name: each.guest_free_bytes for name, each in report.measures.items()},
        least_bytes=fall.least if fall is not None else None,
        seconds_to_least=fall.seconds_to_least if fall is not None else None,
        seconds_to_level=fall.seconds_to(level.bytes) if fall is not None and level is not None else None,
        least_free_bytes=_least(point.least_free_bytes for point in later),
        least_available_bytes=_least(point.least_available_bytes for point in later),
        counters=run.counters,
        oom_kills=run.oom_kills,
        oom_kills_at_least=run.oom_kills_at_least,
        guest_times=guest_times(report),
        slowdown=_slowdown(run, none),
        loads=report.loads,
        waited_s=report.stalls.sum_s,
        wait_p99_s=report.stalls.p99_s,
        cpu=cpu,
        cpu_share=cpu.total / seconds if cpu is not None and seconds else None,
        end=_end(run.last) if run.last is not None else None,
    )


def guest_times(report: ScenarioReport, after: int = 0) -> list[GuestTime]:
    """The guest's commands that ended well, of the steps after number ``after``."""
    done = (step for step in report.steps if step.verb == "guest" and step.outcome is Outcome.OK)
    return [GuestTime(title=step.title, seconds=step.seconds) for step in done if step.number > after]


def _least(sizes: Iterable[int | None]) -> int | None:
    return min((size for size in sizes if size is not None), default=None)


def _of(runs: Sequence[MethodRun], method: Method) -> MethodRun | None:
    return next((run for run in runs if run.method is method), None)


def _end(last: Measure) -> EndFigures:
    return EndFigures(
        backing_bytes=last.backing_bytes,
        store_bytes=last.store_memory_bytes,
        qemu_bytes=last.qemu_rss_bytes,
        pager_bytes=last.pager_pss_bytes,
        agent_bytes=last.agent_rss_bytes,
        layer_cached_bytes=last.layer_cached_bytes,
        content_refaults=last.layer_refaults + last.preserved_refaults,
        zero_refaults=last.zero_refaults,
        first_touches=last.first_touches,
    )


def _cpu(run: MethodRun) -> CpuSeconds | None:
    first, last = run.first, run.last
    if first is None or last is None:
        return None
    return CpuSeconds(
        qemu=last.qemu_cpu_s - first.qemu_cpu_s,
        # One that died took its time with it.
        pager=max(0.0, last.pager_cpu_s - first.pager_cpu_s),
        agent=last.agent_cpu_s - first.agent_cpu_s,
    )


def _seconds(run: MethodRun) -> float | None:
    return run.last.uptime_s - run.first.uptime_s if run.first is not None and run.last is not None else None


def _slowdown(run: MethodRun, none: MethodRun | None) -> float | None:
    """What was done before the reclaim is the same work under every method: it would only dilute the figure."""
    if run.report is None or none is None or none.report is None:
        return None
    if [step.title for step in guest_times(run.report)] != [step.title for step in guest_times(none.report)]:
        return None
    ours = guest_times(run.report, run.begin.step or 0)
    before = sum(step.seconds for step in guest_times(none.report, none.begin.step or 0))
    return sum(step.seconds for step in ours) / before if before > 0 else None
