"""How long refaults were waited for: a histogram with a logarithmic axis of time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from xml.etree.ElementTree import Element

import numpy as np

from hva_host.agent.model import StallStats
from hva_host.report.html.elements import element, in_words, legend, table
from hva_host.report.html.plot import LEFT, RIGHT, WIDTH, Panel, Scale, drawing, fixed
from hva_host.report.html.shown import Shown
from hvaqemu.units import format_duration

_TOP, _HEIGHT, _FOOT = 34.0, 190.0, 40.0


def stalls(identifier: str, reports: Sequence[Shown]) -> list[Element]:
    """The figure: bars for one report, a curve for each of several."""
    known = [shown for shown in reports if shown.stalls.buckets]
    if not known:
        waited = any(shown.stalls.count for shown in reports)
        said = "Waits were not counted by how long they were." if waited else "No vCPU waited for a page."
        return [element("p", {"class": "note"}, said)]
    uppers = [bucket.upper_s for shown in known for bucket in shown.stalls.buckets]
    # A bucket ends where its name says and begins at half of that.
    x = Scale(math.log2(min(uppers)) - 1, math.log2(max(uppers)), LEFT, WIDTH - RIGHT)
    most = max(bucket.count for shown in known for bucket in shown.stalls.buckets)
    decades = math.ceil(math.log10(most)) or 1
    # A single wait is to be seen too, so the axis begins below one.
    y = Scale(-0.3, decades + 0.1, _TOP + _HEIGHT, _TOP)
    panel = Panel(x, y)
    parts = panel.frame("waits (logarithmic)", lambda value: f"{10**value:,.0f}", range(decades + 1))
    ticks = [10.0**power for power in range(-7, 6) if x.low <= math.log2(10.0**power) <= x.high]
    parts += panel.foot(
        lambda place: format_duration(2**place),
        [math.log2(tick) for tick in ticks],
        "from the fault until it was answered",
    )
    if len(reports) == 1:
        parts += _bars(panel, known[0].stalls)
    else:
        parts += [_outline(panel, shown.stalls, f"line-{reports.index(shown) + 1}") for shown in known]
    says = "; ".join(f"{shown.name}: {_words(shown.stalls)}" for shown in known)
    figure = drawing(identifier, panel.bottom + _FOOT, "How long refaults were waited for", says, parts)
    looks = {shown.name: f"method-{reports.index(shown) + 1}" for shown in known}
    made = [legend(looks)] if len(reports) > 1 else [element("p", {}, f"{_words(known[0].stalls)}.")]
    return [*made, figure, in_words("The histogram as a table", _table(known))]


def _words(found: StallStats) -> str:
    return (
        f"{found.count:,} waits, {format_duration(found.sum_s)} in all; median {format_duration(found.median_s)}, "
        f"p99 {format_duration(found.p99_s)}, longest {format_duration(found.longest_s)}"
    )


def _bars(panel: Panel, found: StallStats) -> list[Element]:
    parts = []
    for bucket in found.buckets:
        begin, end = panel.x(math.log2(bucket.upper_s) - 1), panel.x(math.log2(bucket.upper_s))
        top = panel.y(math.log10(bucket.count))
        place = {
            "x": fixed(begin + 1),
            "width": fixed(end - begin - 2),
            "y": fixed(top),
            "height": fixed(panel.bottom - top),
        }
        parts += [
            element("rect", {"class": "fill-refault", **place}),
            element(
                "text", {"class": "tick", "x": fixed((begin + end) / 2), "y": fixed(top - 4), "text-anchor": "middle"},
                _short(bucket.count),
            ),
        ]  # fmt: skip
    for name, value in (("median", found.median_s), ("p99", found.p99_s)):
        moment = math.log2(value) if value > 0 else panel.x.low
        if panel.x.low <= moment <= panel.x.high:
            at = panel.x(moment)
            anchor = "end" if at > WIDTH - RIGHT - 60 else "start"
            text = {"class": "label", "x": fixed(at + (3 if anchor == "start" else -3)), "text-anchor": anchor}
            parts += [panel.line_at(moment, "mark"), element("text", {**text, "y": fixed(_TOP - 16)}, name)]
    return parts


def _outline(panel: Panel, found: StallStats, look: str) -> Element:
    at: list[float] = []
    values: list[float] = []
    for bucket in found.buckets:
        right, height = math.log2(bucket.upper_s), math.log10(bucket.count)
        if not at or at[-1] < right - 1.01:
            # An empty bucket lies before it.
            at += [at[-1], right - 1] if at else [right - 1]
            values += [panel.y.low] * (2 if len(at) > 1 else 1)
        at += [right - 1, right]
        values += [height, height]
    return panel.curve(np.array([*at, at[-1]]), np.array([*values, panel.y.low]), look)


def _short(count: int) -> str:
    for unit, factor in (("M", 10**6), ("k", 10**3)):
        if count >= 10 * factor:
            return f"{count / factor:.0f}{unit}"
    return f"{count:,}"


def _table(reports: Sequence[Shown]) -> Element:
    counts = [{bucket.upper_s: bucket.count for bucket in shown.stalls.buckets} for shown in reports]
    uppers = sorted({upper for found in counts for upper in found})
    rows = [[format_duration(upper), *(f"{found.get(upper, 0):,}" for found in counts)] for upper in uppers]
    return table(["waits of at most", *(shown.name for shown in reports)], rows, "numbers")
