"""What a comparison shows, as rows of words and numbers: the text for terminals and the page are made from these."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from hva_host.compare.figures import EndFigures, Figures, Level, compared
from hva_host.compare.method import Method
from hva_host.compare.model import ComparisonReport, CpuSeconds, GuestCounters, MethodRun
from hva_host.load.model import LoadResult
from hva_host.report.model import Outcome
from hvaqemu.units import MiB, format_duration, format_frequency

Cell = Callable[[Figures], str]
Found = Sequence[Figures | None]

#: Where a figure is not known, or means nothing.
NOTHING = "-"
#: Letters of a step's title in a row's name.
_TITLE = 34

#: What has to be said with every figure.
NOTES = (
    "Memory is what the host has in use for the guest's RAM: backing and compressed store. All methods run with the "
    "pager attached, so that they are measured alike: the first touch of a page costs each of them the pager's answer.",
    "The host agent is one process for all methods, which also plays and measures the scenario: later methods find it "
    "larger. What the host's page cache holds of layers is shared between VMs, and the host may drop it.",
)


class Row(NamedTuple):
    """A figure of every method."""

    name: str
    cells: list[str]


class Column(NamedTuple):
    """A method, as the head of its column."""

    method: Method
    #: Why its figures are not to be counted, or "".
    broken: str


def columns(report: ComparisonReport) -> list[Column]:
    """The methods, in the order of their runs."""
    return [Column(run.method, run.broken) for run in report.runs]


def rows(report: ComparisonReport) -> list[Row]:
    """All figures."""
    level, found = compared(report.runs)
    by_steps = any(run.begin.step is not None for run in report.runs)
    cells = [*_memory(found, level), *_guest(found), *_work(found, by_steps), *_refaults(), *_costs(), *_at_end()]
    shown = (Row(name, [NOTHING if each is None else cell(each) for each in found]) for name, cell in cells)
    return [Row("outcome", [outcome(run) for run in report.runs]), *shown]


def _memory(found: Found, level: Level | None) -> Iterator[tuple[str, Cell]]:
    yield "seconds of the run", lambda each: _number(each.seconds, ".1f")
    for name in _names(each.memory for each in found if each is not None):
        yield f"memory at {name}, MiB", _memory_at(name)
        if any(each.store.get(name) for each in found if each is not None):
            yield "of that the store, MiB", _store_at(name)
    yield "memory, least, MiB", lambda each: _mib(each.least_bytes)
    yield "seconds to within 5 % of that", lambda each: _number(each.seconds_to_least, ".1f")
    if level is not None:
        name = f"seconds to {_mib(level.bytes)} MiB, {level.why}"
        yield name, lambda each: _number(each.seconds_to_level, ".1f")


def _guest(found: Found) -> Iterator[tuple[str, Cell]]:
    for name in _names(each.guest_free for each in found if each is not None):
        yield f"guest free at {name}, MiB", _free_at(name)
    yield "guest free, least, MiB", lambda each: _mib(each.least_free_bytes)
    yield "guest available, least, MiB", lambda each: _mib(each.least_available_bytes)
    yield "OOM kills in the guest", _kills


def _work(found: Found, by_steps: bool) -> Iterator[tuple[str, Cell]]:
    # A run that failed has not come to all of them.
    longest = max((each.guest_times for each in found if each is not None), key=len, default=[])
    for number, step in enumerate(longest):
        yield f"{_cut(step.title)}, s", _seconds_of(number)
    which = "commands from the reclaim on" if by_steps else "all commands"
    yield f"{which} / under none", lambda each: _number(each.slowdown, ".2f")
    for name in _names(each.loads for each in found if each is not None):
        yield f"load {name}, right answers", _load(name, lambda load: format_frequency(load.throughput))
        yield f"load {name}, p50", _load(name, lambda load: format_duration(load.p50_s))
        yield f"load {name}, p99", _load(name, lambda load: format_duration(load.p99_s))
        yield f"load {name}, p99.9", _load(name, lambda load: format_duration(load.p999_s))


def _refaults() -> Iterator[tuple[str, Cell]]:
    yield "guest's own refaults, of files", _counters(lambda counters: format(counters.refault_file, ",d"))
    yield "guest's own refaults, of swap", _counters(lambda counters: format(counters.refault_anon, ",d"))
    yield "guest's major faults", _counters(lambda counters: format(counters.major_faults, ",d"))
    yield "hva's refaults, with content", _end(lambda end: format(end.content_refaults, ",d"))
    yield "hva's refaults, with zeros", _end(lambda end: format(end.zero_refaults, ",d"))
    yield "first touches", _end(lambda end: format(end.first_touches, ",d"))
    yield "vCPUs waited for pages", lambda each: format_duration(each.waited_s)
    yield "the same, p99", lambda each: format_duration(each.wait_p99_s)


def _costs() -> Iterator[tuple[str, Cell]]:
    yield "host CPU: QEMU, s", _cpu(lambda cpu: format(cpu.qemu, ".1f"))
    yield "host CPU: pager, s", _cpu(lambda cpu: format(cpu.pager, ".2f"))
    yield "host CPU: host agent, s", _cpu(lambda cpu: format(cpu.agent, ".1f"))
    yield "host CPU, of a core", lambda each: _number(each.cpu_share, ".1%")


def _at_end() -> Iterator[tuple[str, Cell]]:
    yield "at the end: backing, MiB", _end(lambda end: _mib(end.backing_bytes))
    yield "at the end: store, MiB", _end(lambda end: _mib(end.store_bytes))
    yield "at the end: QEMU itself, MiB", _end(lambda end: _mib(end.qemu_bytes))
    yield "at the end: pager, MiB", _end(lambda end: _mib(end.pager_bytes))
    yield "at the end: host agent, MiB", _end(lambda end: _mib(end.agent_bytes))
    yield "at the end: layers cached, MiB", _end(lambda end: _mib(end.layer_cached_bytes))


def _kills(each: Figures) -> str:
    known = _number(each.oom_kills, "d")
    return f"at least {known}" if each.oom_kills_at_least else known


def _memory_at(name: str) -> Cell:
    return lambda each: _mib(each.memory.get(name))


def _end(shown: Callable[[EndFigures], str]) -> Cell:
    return lambda each: NOTHING if each.end is None else shown(each.end)


def _counters(shown: Callable[[GuestCounters], str]) -> Cell:
    return lambda each: NOTHING if each.counters is None else shown(each.counters)


def _cpu(shown: Callable[[CpuSeconds], str]) -> Cell:
    return lambda each: NOTHING if each.cpu is None else shown(each.cpu)


def _store_at(name: str) -> Cell:
    return lambda each: _mib(each.store.get(name))


def _free_at(name: str) -> Cell:
    return lambda each: _mib(each.guest_free.get(name))


def _seconds_of(number: int) -> Cell:
    return lambda each: f"{each.guest_times[number].seconds:.1f}" if number < len(each.guest_times) else NOTHING


def outcome(run: MethodRun) -> str:
    """How a run ended, in two words."""
    if run.broken:
        return "not working"
    if run.report is None:
        return "not launched"
    if run.report.interrupted:
        return "interrupted"
    return "ok" if run.ok else "FAILED"


def remarks(report: ComparisonReport) -> Iterator[str]:
    """What the rows do not say: what does not work, what went wrong, what was not played."""
    for run in report.runs:
        if run.broken:
            yield f"{run.method}: not working on this guest: {run.broken}; its figures are shown, and mean nothing"
        if run.error:
            yield f"{run.method}: could not be launched: {run.error}"
        if run.probe is not None and run.probe.works is None:
            yield f"{run.method}: whether it works on this guest could not be found out: {run.probe.why}"
        yield from (f"{run.method}: {remark}" for remark in run.remarks)
        yield from (f"{run.method}: {failure}" for failure in run.failures)
        if run.report is not None:
            yield from (f"{run.method}: {failure}" for failure in run.report.failures)
    for step in dict.fromkeys(step for run in report.runs for step in run.left_out):
        yield f"not played under {', '.join(run.method for run in report.runs if step in run.left_out)}: {step}"
    if report.stopped:
        yield f"ended early: {report.stopped}"
    if report.not_run:
        yield f"not come to: {', '.join(report.not_run)}"


def verdict(report: ComparisonReport) -> str:
    """All of it in a line."""
    if report.interrupted:
        return f"INTERRUPTED by {report.interrupted}"
    if report.stopped:
        return "FAILED: the comparison could not go on"
    if not report.ok:
        return "FAILED: a method that works did not do all the work, or not all that was to hold did"
    checked = sum(
        step.verb == "same" and step.outcome is Outcome.OK
        for run in report.runs
        if run.report is not None
        for step in run.report.steps
    )
    same = "every byte that was compared stayed the same" if checked else "the scenario compared no bytes"
    return f"DONE: every method that works did all the work; {same}"


def _load(name: str, shown: Callable[[LoadResult], str]) -> Cell:
    return lambda each: shown(each.loads[name]) if name in each.loads else NOTHING


def _names(found: Iterable[Mapping[str, object]]) -> list[str]:
    """The names of measures or loads, in the scenario's order; a run that failed has not all of them."""
    return list(dict.fromkeys(name for each in found for name in each))


def _cut(title: str) -> str:
    title = title.removeprefix("guest: ")
    return title if len(title) <= _TITLE else title[: _TITLE - 1].rstrip("…") + "…"


def _mib(size: int | None) -> str:
    return NOTHING if size is None or size < 0 else f"{size / MiB:.1f}"


def _number(value: float | None, form: str) -> str:
    return NOTHING if value is None else format(value, form)
