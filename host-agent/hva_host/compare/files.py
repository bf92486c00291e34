"""The files of a comparison: ``report.html`` with all methods, ``comparison.json``, ``.txt`` and ``.png``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element

from hva_host.compare.figures import compared
from hva_host.compare.model import ComparisonReport, MethodRun
from hva_host.compare.rows import NOTES, Column, columns, outcome, remarks, rows, verdict
from hva_host.compare.table import comparison_text
from hva_host.report.files import PAGE_FILE, write_file
from hva_host.report.html.elements import Part, element, table
from hva_host.report.html.page import page
from hva_host.report.html.shown import of_run

JSON_FILE = "comparison.json"
TEXT_FILE = "comparison.txt"
PICTURE_FILE = "comparison.png"


def comparison_data(report: ComparisonReport) -> dict[str, Any]:
    """The comparison with its verdict first, and each run with its figures, fit for JSON."""
    level, figures = compared(report.runs)
    data = report.model_dump(mode="json")
    for run, found, dumped in zip(report.runs, figures, data["runs"], strict=True):
        dumped["outcome"] = outcome(run)
        dumped["figures"] = found.model_dump(mode="json") if found is not None else None
    return {"ok": report.ok, "level": level.model_dump(mode="json") if level is not None else None, **data}


def write_json(report: ComparisonReport, path: Path) -> None:
    """Write the comparison as JSON.

    :raise HostError: no room, or not writable.
    """
    # ASCII: it holds what guests printed.
    text = json.dumps(comparison_data(report), indent=2).replace("\x7f", "\\u007f") + "\n"
    write_file(path, text.encode())


def write_comparison(report: ComparisonReport, folder: Path) -> list[Path]:
    """Write all files into ``folder``; answers their paths. Files of an earlier comparison are replaced.

    :raise HostError: no room, or not writable.
    """
    # matplotlib takes half a second to import; only who wants a picture waits for it.
    from hva_host.compare.picture import draw

    whole, data = folder / PAGE_FILE, folder / JSON_FILE
    text, picture = folder / TEXT_FILE, folder / PICTURE_FILE
    write_json(report, data)
    write_file(text, comparison_text(report).encode())
    write_file(picture, draw(report))
    written = [data, text, picture]
    if page := comparison_page(report):
        write_file(whole, page.encode())
        written.insert(0, whole)
    return written


def comparison_page(report: ComparisonReport) -> str:
    """The page of all methods; "" where none was launched."""
    shown = [of_run(run.report, _name(run)) for run in report.runs if run.report is not None]
    return page(shown, f"{Path(report.source).name}: methods compared", _lead(report)) if shown else ""


def _name(run: MethodRun) -> str:
    return f"{run.method} (not working on this guest)" if run.broken else str(run.method)


def _lead(report: ComparisonReport) -> list[Element]:
    """What the page begins with."""
    shown = columns(report)
    heads = ["", *(f"{column.method}{' (not working)' if column.broken else ''}" for column in shown)]
    body = ([row.name, *map(_cell, row.cells, shown)] for row in rows(report))
    look = "verdict good" if report.ok else "verdict bad"
    return [
        element("p", {}, element("span", {"class": look}, verdict(report))),
        table(heads, body, "numbers"),
        *(element("p", {"class": "note"}, line) for line in (*remarks(report), *NOTES)),
    ]


def _cell(cell: str, column: Column) -> Part:
    return element("span", {"class": "faint"}, cell) if column.broken else cell
