"""The files of a report: ``report.json``, ``report.txt`` (the table), ``report.html`` and ``timeline.png``."""

from __future__ import annotations

import json
from pathlib import Path

from hva_host.report.model import ScenarioReport
from hva_host.report.table import report_text
from hvaqemu.errors import HostError
from hvaqemu.paths import private_folder

JSON_FILE = "report.json"
PAGE_FILE = "report.html"
TEXT_FILE = "report.txt"
PICTURE_FILE = "timeline.png"


def report_json(report: ScenarioReport) -> str:
    """The report as JSON, its verdict first; ends with a line end."""
    # ASCII: it holds what the guest printed, and somebody will look at it on a terminal.
    text = json.dumps({"ok": report.ok, **report.model_dump(mode="json")}, indent=2)
    return text.replace("\x7f", "\\u007f") + "\n"


def report_folder(folder: Path) -> Path:
    """``folder``, made where it is missing: to be called before there is anything to lose.

    :raise HostError: it can not be made.
    """
    try:
        private_folder(folder)
    except OSError as error:
        raise HostError(f"{folder}: {error.strerror}", "choose another place for the report") from error
    return folder


def write_json(report: ScenarioReport, path: Path) -> None:
    """Write the report as JSON.

    :raise HostError: no room, or not writable.
    """
    write_file(path, report_json(report).encode())


def write_report(report: ScenarioReport, folder: Path) -> list[Path]:
    """Write all files of the report into ``folder``; answers their paths. Files of an earlier report are replaced.

    :raise HostError: no room, or not writable.
    """
    # matplotlib takes half a second to import; only who wants a picture waits for it.
    from hva_host.report.html.page import page
    from hva_host.report.html.shown import of_run
    from hva_host.report.picture import draw

    picture, text, data = folder / PICTURE_FILE, folder / TEXT_FILE, folder / JSON_FILE
    whole = folder / PAGE_FILE
    write_file(data, report_json(report).encode())
    write_file(text, report_text(report).encode())
    write_file(whole, page([of_run(report)]).encode())
    write_file(picture, draw(report))
    return [data, text, whole, picture]


def write_page(page: str, path: Path) -> None:
    """Write a page of :mod:`hva_host.report.html`.

    :raise HostError: no room, or not writable.
    """
    write_file(path, page.encode())


def write_file(path: Path, content: bytes) -> None:
    """Write a file of a report: what guests print may be secret, so a new file is its owner's.

    :raise HostError: no room, or not writable.
    """
    try:
        # One that is there keeps its mode.
        path.touch(mode=0o600)
        path.write_bytes(content)
    except OSError as error:
        raise HostError(f"{path}: {error.strerror}", "make room, or choose another place") from error
