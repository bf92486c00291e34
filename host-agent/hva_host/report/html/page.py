"""The page: one report with all its figures, or several side by side."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element

import numpy as np

from hva_host.report.html import tables
from hva_host.report.html.elements import Part, document, element, in_words, legend, raw, script_json, table
from hva_host.report.html.epochs import epochs
from hva_host.report.html.plot import LEFT, RIGHT, WIDTH, Panel, Scale, drawing, seconds_label, time_ticks
from hva_host.report.html.ram_map import ram_map
from hva_host.report.html.shown import Shown, Time, curves, time_of
from hva_host.report.html.stalls import stalls
from hva_host.report.html.timeline import timeline
from hvaqemu.pages import PAGE_SIZE
from hvaqemu.units import MiB, format_duration, format_size

#: Reports that a page shows side by side; there are so many colours.
MOST = 6
_HERE = Path(__file__).parent
_TOP, _HEIGHT, _FOOT = 26.0, 280.0, 40.0


def page(reports: Sequence[Shown], title: str = "", lead: Sequence[Element] = ()) -> str:
    """The page of one report, or of several side by side, one colour each.

    :param reports: at least one, at most :data:`MOST`.
    :param lead: what comes first.
    """
    if not 1 <= len(reports) <= MOST:
        raise ValueError(f"{len(reports)} reports: a page shows 1 to {MOST}")
    data: dict[str, Any] = {"timelines": {}, "maps": {}}
    time = time_of(reports)
    title = title or f"{reports[0].name}: memory report"
    if len(reports) == 1:
        (shown,) = reports
        body = [_head(title, shown), *lead, *_one("run", shown, time, data), *_details("run", shown)]
    else:
        body = [element("header", {}, element("h1", {}, title)), *lead, *_several(reports, time)]
        for number, shown in enumerate(reports, 1):
            swatch = element("span", {"class": f"swatch method-{number}"})
            rest = element("summary", {}, f"{shown.name}: details")
            body += [
                element("h2", {"class": "method"}, swatch, f" {shown.name}"),
                *_one(f"run{number}", shown, time, data),
                element("details", {"class": "rest"}, rest, *_details(f"run{number}", shown)),
            ]
    return document(_html(title, body, data))


def _html(title: str, body: Sequence[Element], data: Any) -> Element:
    style, script = (_HERE / "page.css").read_text(), (_HERE / "page.js").read_text()
    policy = (
        f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; base-uri 'none'; form-action 'none'"
    )
    head = element(
        "head",
        {},
        element("meta", {"charset": "utf-8"}),
        element("meta", {"http-equiv": "Content-Security-Policy", "content": policy}),
        element("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}),
        element("meta", {"name": "color-scheme", "content": "light dark"}),
        element("meta", {"name": "referrer", "content": "no-referrer"}),
        element("title", {}, title),
        raw("style", {}, style),
    )
    tip = element("div", {"id": "tip", "role": "status", "hidden": "hidden"})
    values = raw("script", {"type": "application/json", "id": "data"}, script_json(data))
    return element(
        "html",
        {"lang": "en"},
        head,
        element("body", {}, element("main", {}, *body), tip, values, raw("script", {}, script)),
    )


def _hash(content: str) -> str:
    """What a content security policy knows our own style and script by."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


def _head(title: str, shown: Shown) -> Element:
    look = "verdict" if shown.ok is None else "verdict good" if shown.ok else "verdict bad"
    heading = element("h1", {}, title, " ", element("span", {"class": look}, shown.verdict))
    return element(
        "header", {}, heading, element("p", {"class": "headline"}, tables.headline(shown)), tables.figures(shown)
    )


def _one(identifier: str, shown: Shown, time: Time, data: dict[str, Any]) -> list[Element]:
    """The figures over time of one report."""
    nothing = element("p", {"class": "note"}, "The run ended before there was anything to show.")
    over_time: Sequence[Element] = [nothing]
    if len(shown.timeline) >= 2:
        over_time, data["timelines"][f"{identifier}-timeline"] = timeline(f"{identifier}-timeline", shown, time)
    maps: Sequence[Element] = [element("p", {"class": "note"}, "There is no map of guest RAM.")]
    if shown.ram and shown.memory:
        maps, data["maps"][f"{identifier}-map"] = ram_map(f"{identifier}-map", shown, time)
    return [_section("Guest RAM over time", *over_time), _section("Map of guest RAM over time", *maps)]


def _details(identifier: str, shown: Shown) -> list[Element]:
    """The other figures of one report, and its words and numbers."""
    made = [
        _section("How long refaults were waited for", *stalls(f"{identifier}-stalls", [shown])),
        _section("Where the time of epochs went", *epochs(f"{identifier}-epochs", shown.epochs)),
        _section("What it costs", *tables.costs(shown)),
    ]
    if shown.steps or shown.failures:
        made.append(_section("Steps" if shown.steps else "State", *tables.step_table(shown)))
    made.append(_section("Configuration", tables.configuration(shown)))
    made.append(_section("Versions", tables.versions(shown)))
    return made


def _section(title: str, *parts: Part) -> Element:
    return element("section", {}, element("h2", {}, title), *parts)


def _several(reports: Sequence[Shown], time: Time) -> list[Element]:
    """What several reports have in common: host memory over time, the waits, and a table."""
    return [
        _section("Host memory behind the guest's RAM", *_compared(reports, time)),
        _section("Side by side", _side_by_side(reports)),
        _section("How long refaults were waited for", *stalls("compared-stalls", reports)),
    ]


def _compared(reports: Sequence[Shown], time: Time) -> list[Element]:
    drawn = {number: curves(shown.timeline) for number, shown in enumerate(reports, 1) if len(shown.timeline) >= 2}
    highest = max(
        [shown.memory / MiB for shown in reports] + [float(made.occupied.max()) for made in drawn.values()] + [1.0]
    )
    panel = Panel(Scale(time.begin, time.end, LEFT, WIDTH - RIGHT), Scale(0, highest, _TOP + _HEIGHT, _TOP))
    parts = panel.frame(
        "backing and compressed store, MiB", lambda value: f"{value:,.0f}", [highest * part / 4 for part in range(5)]
    )
    parts += [panel.curve(made.at, made.occupied, f"line-{number}") for number, made in drawn.items()]
    say, title = seconds_label(time.end - time.begin)
    parts += panel.foot(say, time_ticks(panel.x), title)
    says = "; ".join(
        f"{reports[number - 1].name}: {made.occupied[-1]:.0f} MiB at the end" for number, made in drawn.items()
    )
    figure = drawing("compared", panel.bottom + _FOOT, "Host memory behind the guest's RAM", says, parts)
    looks = {shown.name: f"method-{number}" for number, shown in enumerate(reports, 1)}
    moments = np.linspace(time.begin, time.end, 16)
    # Where one had not begun yet, or had ended, its nearest value stands.
    values = {number: np.interp(moments, made.at, made.occupied) for number, made in drawn.items()}
    rows = ([f"{at:.1f}", *(f"{values[number][row]:.1f}" for number in drawn)] for row, at in enumerate(moments))
    head = ["seconds", *(reports[number - 1].name for number in drawn)]
    return [legend(looks), figure, in_words("The curves as a table, MiB", table(head, rows, "numbers"))]


def _side_by_side(reports: Sequence[Shown]) -> Element:
    head = [
        "method",
        "verdict",
        "most",
        "least",
        "at the end",
        "refaulted",
        "waits",
        "waited",
        "p99",
        "longest",
        "took",
    ]
    rows = []
    for shown in reports:
        occupied = [sample.backing_bytes + sample.store_memory_bytes for sample in shown.timeline] or [0]
        back = shown.timeline[-1].refault_pages * PAGE_SIZE if shown.timeline else 0
        waits = shown.stalls
        rows.append(
            [shown.name, shown.verdict]
            + [format_size(size) for size in (max(occupied), min(occupied), occupied[-1], back)]
            + [f"{waits.count:,}", *(format_duration(value) for value in (waits.sum_s, waits.p99_s, waits.longest_s))]
            + [format_duration(shown.total_s)]
        )
    return table(head, rows, "numbers")
