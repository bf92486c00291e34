"""The timeline: where guest RAM is, how the guest sees it, and what came back, with measures and epochs marked."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any
from xml.etree.ElementTree import Element

import numpy as np

from hva_host.agent.model import EpochStats
from hva_host.report.html.elements import element, in_words, legend, table
from hva_host.report.html.plot import (
    LEFT,
    RIGHT,
    WIDTH,
    Panel,
    Scale,
    drawing,
    fixed,
    seconds_label,
    steps,
    time_ticks,
)
from hva_host.report.html.shown import RESIDENCES, STATES, Curves, Shown, Time, curves
from hvaqemu.units import MiB, format_duration

_MEMORY, _GUEST, _BACK = 250.0, 150.0, 70.0
_GAP, _FOOT = 34.0, 40.0
_ROW = 16.0
#: Rows of labels above; one that finds no place there has its line alone.
_ROWS = 5
_LETTER = 8.4
#: Epochs closer than this are marked as one.
_TOUCH = 2.0
_TABLE_ROWS = 24


def timeline(identifier: str, shown: Shown, time: Time) -> tuple[list[Element], dict[str, Any]]:
    """The figure with its legend and its table, and what a script needs to tell the values of a moment."""
    made = curves(shown.timeline)
    x = Scale(time.begin, time.end, LEFT, WIDTH - RIGHT)
    labels, rows = _labels(shown, x)
    top = 26.0 + rows * _ROW
    highest = max(shown.memory / MiB, float(np.sum(list(made.residences.values()), axis=0).max()), 1.0)
    memory = Panel(x, Scale(0, highest, top + _MEMORY, top))
    guest = Panel(x, Scale(0, highest, memory.bottom + _GAP + _GUEST, memory.bottom + _GAP))
    back = Panel(x, Scale(0, float(made.refaults.max()) or 1.0, guest.bottom + _GAP + _BACK, guest.bottom + _GAP))

    parts = _epochs(shown.epochs, memory, back)
    parts += _axes(memory, "guest RAM on the host, MiB", _quarters(memory))
    parts += memory.stack(made.at, [(f"fill-{name}", made.residences[name]) for name in RESIDENCES])
    parts += _axes(guest, "the same RAM as the guest's newest scan sees it, MiB", _quarters(guest))
    stepped = [(f"fill-{name}", steps(made.at, made.states[name])[1]) for name in STATES]
    parts += guest.stack(steps(made.at, made.at)[0], stepped)
    parts += _axes(back, "came back (refaulted), MiB/s", back.y.ticks(3))
    at, rate = steps(made.at, np.append(made.refaults[1:], 0.0))
    parts.append(back.area(at, np.zeros_like(rate), rate, "fill-refault"))
    for measure in shown.measures.values():
        if time.begin <= measure.uptime_s <= time.end:
            parts += [panel.line_at(measure.uptime_s, "mark") for panel in (memory, guest, back)]
    for label in labels:
        parts += _label(top, *label)
    say, title = seconds_label(time.end - time.begin)
    parts += back.foot(say, time_ticks(x), title)
    line = {
        "class": "cursor",
        "x1": 0,
        "x2": 0,
        "y1": fixed(memory.top),
        "y2": fixed(back.bottom),
        "visibility": "hidden",
    }
    parts.append(element("line", line))

    figure = drawing(identifier, back.bottom + _FOOT, f"{shown.name}: guest RAM over time", _sentence(made), parts)
    figure.set("tabindex", "0")
    looks = {
        "resident (backing)": "resident",
        "discarded: comes back from a layer": "layer",
        "discarded: comes back as zeros": "zero",
    }
    if made.residences["preserved"].any():
        looks["discarded: in the compressed store"] = "preserved"
    looks |= {"epochs": "epoch"}
    says = {"stable": "stable", "potential": "potential", "volatile": "volatile", "unused": "unused"}
    guests = element(
        "div", {"class": "legends"}, legend(looks), legend({f"guest: {say}": look for say, look in says.items()})
    )
    return [guests, figure, in_words("The timeline as a table", _table(shown, made))], _data(made, time)


def _quarters(panel: Panel) -> list[float]:
    return [panel.y.high * part / 4 for part in range(5)]


def _axes(panel: Panel, title: str, ticks: Sequence[float]) -> list[Element]:
    return panel.frame(title, lambda value: f"{value:.3g}" if value < 100 else f"{value:,.0f}", ticks)


def _sentence(made: Curves) -> str:
    occupied = made.occupied
    return (
        f"Backing and compressed store begin at {occupied[0]:.0f} MiB, are at most {occupied.max():.0f} MiB, at least "
        f"{occupied.min():.0f} MiB, and {occupied[-1]:.0f} MiB at the end, after "
        f"{format_duration(float(made.at[-1] - made.at[0]))}."
    )


def _labels(shown: Shown, x: Scale) -> tuple[list[tuple[float, int, str, str]], int]:
    """Place, row, anchor and text of each measure's label, and how many rows there are; none lies over another."""
    placed: list[tuple[float, int, str, str]] = []
    taken: list[float] = []
    for name, measure in sorted(shown.measures.items(), key=lambda item: item[1].uptime_s):
        at = x(measure.uptime_s)
        if not x.begin <= at <= x.end:
            continue
        text = f"{name} {measure.backing_bytes / MiB:.0f}"
        width = (len(text) + 2) * _LETTER
        # Near the right edge a label ends at its line instead of beginning there.
        anchor = "end" if at + width > x.end and at - width >= x.begin else "start"
        begin = at - width if anchor == "end" else at
        row = next((number for number, end in enumerate(taken) if end <= begin), len(taken))
        if row < _ROWS:
            taken[row : row + 1] = [begin + width]
            placed.append((at, row, anchor, text))
    return placed, len(taken)


def _label(top: float, at: float, row: int, anchor: str, text: str) -> list[Element]:
    """The label and a line down to where its measure is marked."""
    place = {"class": "label", "x": fixed(at + (3 if anchor == "start" else -3)), "text-anchor": anchor}
    y = top - 24 - row * _ROW
    line = {"class": "mark", "x1": fixed(at), "x2": fixed(at), "y1": fixed(y - 9), "y2": fixed(top)}
    return [element("line", line), element("text", {**place, "y": fixed(y)}, text)]


def _epochs(epochs: Sequence[EpochStats], first: Panel, last: Panel) -> list[Element]:
    """A bar above for each epoch, and a shade behind; those that follow one another closely are one."""
    parts = []
    for begin, end in _joined((first.x(epoch.at_s - epoch.seconds.total), first.x(epoch.at_s)) for epoch in epochs):
        begin, end = max(begin, first.x.begin), min(max(end, begin + 1.5), first.x.end)
        if begin < end:
            place = {"x": fixed(begin), "width": fixed(end - begin)}
            height = fixed(last.bottom - first.top)
            parts += [
                element("rect", {"class": "shade", **place, "y": fixed(first.top), "height": height}),
                element("rect", {"class": "fill-epoch", **place, "y": fixed(first.top - 4), "height": 4}),
            ]
    return parts


def _joined(spans: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    found: list[tuple[float, float]] = []
    for begin, end in sorted(spans):
        if found and begin <= found[-1][1] + _TOUCH:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((begin, end))
    return found


def _table(shown: Shown, made: Curves) -> Element:
    head = ["moment", "seconds", *(f"{name}, MiB" for name in (*RESIDENCES.values(), "store", *STATES))]
    named = {int(np.searchsorted(made.at, m.uptime_s)): name for name, m in shown.measures.items()}
    indexes = set(np.linspace(0, len(made.at) - 1, _TABLE_ROWS).astype(int).tolist()) | named.keys()
    rows = []
    for index in sorted(index for index in indexes if index < len(made.at)):
        values = [*(made.residences[name] for name in RESIDENCES), made.store, *(made.states[name] for name in STATES)]
        rows.append([named.get(index, "-"), f"{made.at[index]:.1f}", *(f"{value[index]:.1f}" for value in values)])
    return table(head, rows, "numbers")


def _data(made: Curves, time: Time) -> dict[str, Any]:
    columns = {
        "backing": made.residences["resident"],
        "in a layer": made.residences["layer"],
        "zero": made.residences["zero"],
        "paged out": made.residences["preserved"],
        "store": made.store,
        **{f"guest: {state}": made.states[state] for state in STATES},
        "came back, MiB/s": made.refaults,
    }
    return {
        "plot": [LEFT, WIDTH - RIGHT, WIDTH],
        "time": [time.begin, time.end],
        "at": np.round(made.at, 2).tolist(),
        "columns": [[name, np.round(values, 1).tolist()] for name, values in columns.items() if values.any()],
    }
