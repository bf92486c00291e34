"""Where the time of epochs went: a bar an epoch, stacked by phase."""

from __future__ import annotations

from collections.abc import Sequence
from xml.etree.ElementTree import Element

import numpy as np

from hva_host.agent.model import EpochStats
from hva_host.report.html.elements import element, in_words, legend, table
from hva_host.report.html.plot import LEFT, RIGHT, WIDTH, Panel, Scale, drawing, fixed
from hvaqemu.units import format_duration

_TOP, _HEIGHT, _FOOT = 26.0, 190.0, 40.0
#: Bars drawn; where there are more epochs, each stands for several that followed one another.
_BARS = 120
_TABLE_ROWS = 60
_PHASES = {
    "scan": "the guest's agent looks at its pages",
    "protect": "candidates are write-protected",
    "prove": "bytes are compared",
    "preserve": "pages are compressed",
    "confirm": "the guest is asked again",
    "discard": "frames are given back",
    "paused": "the guest stands still, for direct I/O",
}


def epochs(identifier: str, found: Sequence[EpochStats]) -> list[Element]:
    """The figure with its legend and its table."""
    if not found:
        return [element("p", {"class": "note"}, "No epoch ran.")]
    groups = np.array_split(np.arange(len(found)), min(len(found), _BARS))
    means = np.array([[_mean([found[at] for at in group], phase) for phase in _PHASES] for group in groups])
    highest = float(means.sum(axis=1).max()) or 1e-3
    panel = Panel(Scale(0, len(groups), LEFT, WIDTH - RIGHT), Scale(0, highest, _TOP + _HEIGHT, _TOP))
    unit, factor = ("ms", 1000.0) if highest < 1 else ("s", 1.0)
    title = f"{unit} an epoch" + ("" if len(groups) == len(found) else ", mean of those that a bar stands for")
    parts = panel.frame(title, lambda value: f"{value * factor:g}", panel.y.ticks(6))
    for place, group in enumerate(groups):
        parts += _bar(panel, place, means[place], _name([found[at].number for at in group]))
    # As many numbers as have room.
    every = -(-len(groups) // 24)
    ticks = [place + 0.5 for place in range(0, len(groups), every)]
    parts += panel.foot(lambda place: str(found[int(groups[int(place)][0])].number), ticks, "epoch")
    says = f"{len(found)} epochs of {format_duration(sum(epoch.seconds.total for epoch in found))} in all."
    figure = drawing(identifier, panel.bottom + _FOOT, "Where the time of epochs went", says, parts)
    looks = {
        f"{phase}: {says}": f"phase-{phase}" for at, (phase, says) in enumerate(_PHASES.items()) if means[:, at].any()
    }
    return [legend(looks), figure, in_words("The epochs as a table", _table(found))]


def _mean(found: Sequence[EpochStats], phase: str) -> float:
    return float(np.mean([getattr(epoch.seconds, phase) for epoch in found]))


def _name(numbers: Sequence[int]) -> str:
    return f"epoch {numbers[0]}" if len(numbers) == 1 else f"epochs {numbers[0]} to {numbers[-1]}"


def _bar(panel: Panel, place: int, means: Sequence[float], name: str) -> list[Element]:
    wide = panel.x(1) - panel.x(0)
    # A few epochs do not need bars as wide as a page.
    width = min(wide - (1 if wide > 4 else 0), 40.0)
    left, bottom = panel.x(place) + (wide - width) / 2, panel.bottom
    parts, said = [], []
    for phase, mean in zip(_PHASES, means, strict=True):
        if mean <= 0:
            continue
        said.append(f"{phase} {format_duration(mean)}")
        height = panel.y.begin - panel.y(mean)
        bottom -= height
        # A hair of the background between two phases.
        shown = max(height - 0.6, 0.2)
        place_ = {
            "x": fixed(left),
            "width": fixed(width),
            "y": f"{bottom + height - shown:.2f}",
            "height": f"{shown:.2f}",
        }
        parts.append(element("rect", {"class": f"fill-phase-{phase}", **place_}))
    tip = element("title", {}, f"{name}: {', '.join(said)}")
    return [element("g", {}, tip, *parts)]


def _table(found: Sequence[EpochStats]) -> Element:
    counts = ("candidates", "proven", "touched", "unmatched", "unconfirmed", "unpreserved", "resting", "discarded")
    rows = [
        [
            str(epoch.number),
            f"{epoch.at_s:.1f}" if epoch.at_s else "-",
            *(f"{getattr(epoch, name):,}" for name in counts),
            *(format_duration(getattr(epoch.seconds, phase)) for phase in (*_PHASES, "total")),
            format_duration(epoch.protected_s),
            epoch.note,
        ]
        for epoch in found[-_TABLE_ROWS:]
    ]
    made = table(["epoch", "at, s", *counts, *_PHASES, "total", "protected", "note"], rows, "numbers")
    if len(found) <= _TABLE_ROWS:
        return made
    return element("div", {}, element("p", {"class": "note"}, f"The last {_TABLE_ROWS} of {len(found):,}."), made)
