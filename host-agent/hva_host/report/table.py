"""The report as text for a terminal: the table of measures, what vCPUs waited, the verdict.

Everything goes through :class:`rich.text.Text`, never through markup: names and outputs are data.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from hva_host.agent.model import Measure
from hva_host.report.model import Outcome, ScenarioReport
from hvaqemu.pages import PAGE_SIZE
from hvaqemu.units import MiB, format_duration

Cell = Callable[[Measure], str]

#: Columns a terminal needs for all in one table; narrower ones get two.
WIDE = 118
#: Columns of the text that goes into a file.
TEXT_WIDTH = 120


def _mib(size: int) -> str:
    return f"{size / MiB:.1f}"


def _pages(pages: int) -> str:
    return _mib(pages * PAGE_SIZE)


_GUEST: list[tuple[str, Cell]] = [
    ("resident", lambda m: _pages(m.resident_pages)),
    ("zero", lambda m: _pages(m.zero_pages)),
    ("layer", lambda m: _pages(m.layer_pages)),
    ("guest\nfree", lambda m: "-" if m.guest_free_bytes < 0 else _mib(m.guest_free_bytes)),
]
_COST: list[tuple[str, Cell]] = [
    ("QEMU\nown", lambda m: _mib(m.qemu_rss_bytes)),
    ("pager", lambda m: _mib(m.pager_pss_bytes)),
    ("host\nagent", lambda m: _mib(m.agent_rss_bytes)),
    ("store", lambda m: _mib(m.store_bytes)),
    ("layers\ncached", lambda m: _mib(m.layer_cached_bytes)),
    ("refaults", lambda m: f"{m.refaults:,}"),
    ("refaulted", lambda m: _pages(m.refault_pages)),
]


def saving(measure: Measure, first: Measure) -> str:
    """How much less backing and store ``measure`` has than ``first``, as "82 %"; negative where it has more."""
    before, now = first.backing_bytes + first.store_bytes, measure.backing_bytes + measure.store_bytes
    if measure is first or not before:
        return "-"
    return f"{round((1 - now / before) * 100)} %"


def render(report: ScenarioReport, width: int) -> RenderableType:
    """Table, costs and verdict for a terminal ``width`` columns wide."""
    parts: list[RenderableType] = []
    if report.measures:
        parts.append(Text(""))
        first = next(iter(report.measures.values()))
        backing: list[tuple[str, Cell]] = [
            ("backing", lambda m: _mib(m.backing_bytes)),
            ("saved", lambda m: saving(m, first)),
        ]
        guest = _GUEST
        if any(measure.preserved_pages or measure.store_bytes for measure in report.measures.values()):
            backing.insert(1, ("store", lambda m: _mib(m.store_bytes)))
            guest = [*_GUEST[:-1], ("paged\nout", lambda m: _pages(m.preserved_pages)), _GUEST[-1]]
        if width >= WIDE and guest is _GUEST:
            parts.append(_table("MiB", report, backing + guest + _COST))
        else:
            parts.append(_table("guest RAM on the host, MiB", report, backing + guest))
            parts.append(Text(""))
            parts.append(_table("what it costs the host, MiB", report, _COST))
    parts.extend(_lines(report))
    return Group(*parts)


def report_text(report: ScenarioReport, width: int = TEXT_WIDTH) -> str:
    """The same as plain text."""
    console = Console(file=io.StringIO(), width=width, color_system=None, force_terminal=False, legacy_windows=False)
    console.print(render(report, width))
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines()) + "\n"


def _table(title: str, report: ScenarioReport, columns: list[tuple[str, Cell]]) -> Table:
    table = Table(title=Text(title), title_justify="left", title_style="dim", box=None, padding=(0, 2, 0, 0))
    table.add_column(Text("measure"), no_wrap=True)
    for head, _cell in columns:
        style = "bold" if head in ("backing", "saved") else ""
        table.add_column(Text(head, justify="right"), justify="right", no_wrap=True, style=style, vertical="bottom")
    for name, measure in report.measures.items():
        table.add_row(Text(name), *(Text(cell(measure)) for _head, cell in columns))
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
