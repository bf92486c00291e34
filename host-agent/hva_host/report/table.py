"""The report as text for a terminal: the table of measures, what vCPUs waited, the verdict.

Everything goes through :class:`rich.text.Text`, never through markup: names and outputs are data.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from hva_host.agent.model import Measure
from hva_host.load.model import LoadResult
from hva_host.report.model import Outcome, ScenarioReport
from hvaqemu.pages import PAGE_SIZE
from hvaqemu.units import MiB, format_duration, format_frequency

Cell = Callable[[Measure], str]
Columns = list[tuple[str, Cell]]

#: Columns a terminal needs for all in one table; narrower ones get two.
WIDE = 118
#: Columns of a table about guest RAM that leave room for what it costs beside them.
_NARROW = 6
#: Columns of the text that goes into a file.
TEXT_WIDTH = 120


def _mib(size: int) -> str:
    return f"{size / MiB:.1f}"


def _pages(pages: int) -> str:
    return _mib(pages * PAGE_SIZE)


_GUEST: Columns = [
    ("resident", lambda m: _pages(m.resident_pages)),
    ("zero", lambda m: _pages(m.zero_pages)),
    ("layer", lambda m: _pages(m.layer_pages)),
    ("guest\nfree", lambda m: "-" if m.guest_free_bytes < 0 else _mib(m.guest_free_bytes)),
]
_COST: Columns = [
    ("QEMU\nown", lambda m: _mib(m.qemu_rss_bytes)),
    ("pager", lambda m: _mib(m.pager_pss_bytes)),
    ("host\nagent", lambda m: _mib(m.agent_rss_bytes)),
    ("store", lambda m: _mib(m.store_memory_bytes)),
    ("layers\ncached", lambda m: _mib(m.layer_cached_bytes)),
    ("refaults", lambda m: f"{m.refaults:,}"),
    ("refaulted", lambda m: _pages(m.refault_pages)),
]


def saving(measure: Measure, first: Measure) -> str:
    """How much less memory backing and store of ``measure`` have than those of ``first``, as "82 %"; negative where
    they have more."""
    before, now = (each.backing_bytes + each.store_memory_bytes for each in (first, measure))
    if measure is first or not before:
        return "-"
    return f"{round((1 - now / before) * 100)} %"


def columns(measures: Mapping[str, Measure]) -> tuple[Columns, Columns]:
    """What the tables of some measures show, in MiB: guest RAM on the host, and what it costs the host."""
    first = next(iter(measures.values()))
    backing: Columns = [
        ("backing", lambda m: _mib(m.backing_bytes)),
        ("saved", lambda m: saving(m, first)),
    ]
    if not any(measure.preserved_pages or measure.store_bytes for measure in measures.values()):
        return backing + _GUEST, _COST
    on_disk = any(measure.store_cached_bytes is not None for measure in measures.values())
    backing.insert(1, ("store\non disk" if on_disk else "store", lambda m: _mib(m.store_bytes)))
    return [*backing, *_GUEST[:-1], ("paged\nout", lambda m: _pages(m.preserved_pages)), _GUEST[-1]], _COST


def render(report: ScenarioReport, width: int) -> RenderableType:
    """Table, costs and verdict for a terminal ``width`` columns wide."""
    parts: list[RenderableType] = []
    if report.measures:
        parts.append(Text(""))
        guest, cost = columns(report.measures)
        if width >= WIDE and len(guest) <= _NARROW:
            parts.append(_table("MiB", report, guest + cost))
        else:
            parts.append(_table("guest RAM on the host, MiB", report, guest))
            parts.append(Text(""))
            parts.append(_table("what it costs the host, MiB", report, cost))
    if report.loads:
        parts += [Text(""), _loads(report.loads)]
    parts.extend(_lines(report))
    return Group(*parts)


def report_text(report: ScenarioReport, width: int = TEXT_WIDTH) -> str:
    """The same as plain text."""
    console = Console(file=io.StringIO(), width=width, color_system=None, force_terminal=False, legacy_windows=False)
    console.print(render(report, width))
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines()) + "\n"


def _table(title: str, report: ScenarioReport, shown: Columns) -> Table:
    table = Table(title=Text(title), title_justify="left", title_style="dim", box=None, padding=(0, 2, 0, 0))
    table.add_column(Text("measure"), no_wrap=True)
    for head, _cell in shown:
        style = "bold" if head in ("backing", "saved") else ""
        table.add_column(Text(head, justify="right"), justify="right", no_wrap=True, style=style, vertical="bottom")
    for name, measure in report.measures.items():
        table.add_row(Text(name), *(Text(cell(measure)) for _head, cell in shown))
    return table


def _loads(loads: Mapping[str, LoadResult]) -> Table:
    title = Text("right answers a second, and how long they took from when they were due")
    table = Table(title=title, title_justify="left", title_style="dim", box=None, padding=(0, 2, 0, 0))
    table.add_column(Text("load"), no_wrap=True)
    for head in ("right", "failed", "p50", "p99", "p99.9", "sender late"):
        table.add_column(Text(head, justify="right"), justify="right", no_wrap=True)
    for name, load in loads.items():
        times = (load.p50_s, load.p99_s, load.p999_s, load.sent_late_p99_s)
        figures = (format_frequency(load.throughput), f"{load.failed:,}", *map(format_duration, times))
        table.add_row(Text(name), *map(Text, figures))
    return table


def _lines(report: ScenarioReport) -> Iterator[Text]:
    if report.epochs:
        discarded = sum(epoch.discarded for epoch in report.epochs)
        layer = sum(epoch.discarded_layer for epoch in report.epochs)
        store = sum(epoch.discarded_store for epoch in report.epochs)
        stored = f", {store:,} to the compressed store" if store else ""
        yield Text(
            f"\nepochs: {len(report.epochs):,}; pages they discarded: {discarded:,}, {layer:,} of them to a layer"
            f"{stored}; touched in time, so kept: {sum(epoch.touched for epoch in report.epochs):,}"
        )
    stalls = report.stalls
    if stalls.count:
        yield Text(
            f"vCPUs waited {format_duration(stalls.sum_s)} in all, {stalls.count:,} times: median "
            f"{format_duration(stalls.median_s)}, p99 {format_duration(stalls.p99_s)}, longest "
            f"{format_duration(stalls.longest_s)}"
        )
    yield Text("")
    checks = [step for step in report.steps if step.verb in ("same", "expect") and step.outcome is not Outcome.NOT_RUN]
    for step in checks:
        good = step.outcome is Outcome.OK
        line = Text("  ok    " if good else "  FAIL  ", style="green" if good else "bold red")
        line.append(f"{step.title}{': ' if step.figures else ''}{step.figures}", style="default not bold")
        yield line
    if report.ok:
        yield Text(f"PASSED: every step and expectation held, in {format_duration(report.total_s)}", style="bold green")
        return
    for said in report.console_tail:
        yield Text(f"  console  {said}", style="dim")
    for failure in report.failures:
        yield Text(f"  {failure}", style="red")
    yield Text("FAILED", style="bold red")
