"""A comparison as text for a terminal: a column a method. Names and outputs are data, never markup."""

from __future__ import annotations

import io

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from hva_host.compare.model import ComparisonReport
from hva_host.compare.rows import NOTES, columns, remarks, rows, verdict

#: Columns of the text that goes into a file.
TEXT_WIDTH = 120


def render(report: ComparisonReport) -> RenderableType:
    """Table, remarks and verdict."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column(Text(""), no_wrap=True)
    shown = columns(report)
    for column in shown:
        style = "dim" if column.broken else "bold" if column.method == "hva" else ""
        # In grey and in a file the mark says what the colour says.
        head = f"({column.method})" if column.broken else str(column.method)
        table.add_column(Text(head, justify="right"), justify="right", style=style, overflow="fold")
    for row in rows(report):
        cells = (f"({cell})" if column.broken else cell for cell, column in zip(row.cells, shown, strict=True))
        table.add_row(Text(row.name), *map(Text, cells))
    said = [Text(line, style="yellow") for line in remarks(report)]
    end = Text(verdict(report), style="bold green" if report.ok else "bold red")
    return Group(Text(""), table, Text(""), *said, *(Text(note, style="dim") for note in NOTES), end)


def comparison_text(report: ComparisonReport) -> str:
    """The same as plain text."""
    out = io.StringIO()
    console = Console(file=out, width=TEXT_WIDTH, color_system=None, force_terminal=False, legacy_windows=False)
    console.print(render(report))
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"
