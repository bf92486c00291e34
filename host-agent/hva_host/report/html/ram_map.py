"""The map of guest RAM over time: every cell of RAM at every moment, by state or by residence."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Sequence
from typing import Any
from xml.etree.ElementTree import Element

import numpy as np

from hva_host.agent.ram_frames import RamFrame
from hva_host.report.html.elements import element, in_words, legend, table
from hva_host.report.html.plot import LEFT, RIGHT, WIDTH, Panel, Scale, drawing, seconds_label, time_ticks
from hva_host.report.html.shown import Shown, Time
from hvaqemu.pages import PageState, Residence
from hvaqemu.units import MiB

_TOP, _HEIGHT, _FOOT = 22.0, 320.0, 40.0
_TABLE_ROWS = 16
#: In the order of the shares of a map, and then what is none of them.
_RESIDENCES = {
    "resident": Residence.RESIDENT.name,
    "zero": Residence.ZERO.name,
    "layer": Residence.LAYER.name,
    "preserved": Residence.PRESERVED.name,
    "never": "never touched, or ballooned",
}
_STATES = {
    "unused": PageState.UNUSED.name,
    "volatile": PageState.VOLATILE.name,
    "potential": PageState.POTENTIAL.name,
    "stable": PageState.STABLE.name,
}


def ram_map(identifier: str, shown: Shown, time: Time) -> tuple[list[Element], dict[str, Any]]:
    """The figure with its switch, its legends and its table, and what a script draws it from."""
    frames = shown.ram
    panel = Panel(Scale(time.begin, time.end, LEFT, WIDTH - RIGHT), Scale(0, shown.memory / MiB, _TOP + _HEIGHT, _TOP))
    quarters = [shown.memory / MiB * part / 4 for part in range(5)]
    parts = panel.frame("guest physical address, MiB", lambda value: f"{value:,.0f}", quarters)
    say, title = seconds_label(time.end - time.begin)
    parts += panel.foot(say, time_ticks(panel.x), title)
    says = f"{len(frames)} maps of guest RAM in {frames[0].cells} cells of address, one moment after the other."
    figure = drawing(identifier, panel.bottom + _FOOT, f"{shown.name}: map of guest RAM over time", says, parts)
    canvas = element("canvas", {"class": "map", "aria-hidden": "true"})
    box = element("div", {"class": "map-box", "data-map": identifier, "tabindex": 0}, figure, canvas)
    switch = element(
        "fieldset",
        {"class": "switch"},
        element("legend", {}, "coloured by"),
        *_choice(identifier, "states", "state, as the guest's newest scan says", checked=True),
        *_choice(identifier, "residence", "residence on the host", checked=False),
    )
    legends = element(
        "div",
        {"class": "legends"},
        element("div", {"data-legend": f"{identifier} states"}, legend({text: look for look, text in _STATES.items()})),
        element(
            "div",
            {"data-legend": f"{identifier} residence"},
            legend({text: look for look, text in _RESIDENCES.items()}),
        ),
    )
    note = element(
        "p",
        {"class": "note"},
        "Where a cell holds pages of several kinds, its dots are coloured in proportion. Blank: before the first scan.",
    )
    return (
        [switch, legends, box, note, in_words("The maps as a table", _table(frames))],
        {
            "plot": [LEFT, WIDTH - RIGHT, WIDTH, _TOP, _TOP + _HEIGHT, panel.bottom + _FOOT],
            "time": [time.begin, time.end],
            "cells": frames[0].cells,
            "memory": shown.memory,
            "at": [round(frame.at_s, 2) for frame in frames],
            "residence": {"kinds": list(_RESIDENCES.items()), "shares": _residences(frames)},
            "states": {
                "kinds": list(_STATES.items()),
                "shares": _states(frames),
                "known": [int(bool(frame.states)) for frame in frames],
            },
        },
    )


def _choice(identifier: str, value: str, text: str, *, checked: bool) -> list[Element]:
    attributes = {"type": "radio", "name": f"{identifier}-by", "value": value, "id": f"{identifier}-{value}"}
    if checked:
        attributes["checked"] = "checked"
    return [element("label", {}, element("input", attributes), f" {text}")]


def _residences(frames: Sequence[RamFrame]) -> str:
    return _packed([frame.residence_shares() for frame in frames])


def _states(frames: Sequence[RamFrame]) -> str:
    nothing = np.zeros((len(_STATES) - 1, frames[0].cells), dtype=np.uint8)
    found = (frame.state_shares() for frame in frames)
    return _packed([nothing if shares is None else shares for shares in found])


def _packed(shares: Sequence[Any]) -> str:
    """All maps in one: uint8, shape ``(frames, kinds, cells)``, for the browser to inflate."""
    return base64.b64encode(zlib.compress(np.stack(shares).tobytes(), 9)).decode()


def _table(frames: Sequence[RamFrame]) -> Element:
    rows = []
    for index in sorted(set(np.linspace(0, len(frames) - 1, _TABLE_ROWS).astype(int).tolist())):
        frame = frames[index]
        states = frame.state_shares()
        known = ["-"] * len(_STATES) if states is None else _percent(states)
        rows.append([f"{frame.at_s:.1f}", *_percent(frame.residence_shares()), *known])
    head = ["seconds", *(f"{text}, %" for text in (*_RESIDENCES.values(), *_STATES.values()))]
    return table(head, rows, "numbers")


def _percent(shares: Any) -> list[str]:
    """Of all RAM, what is of each kind, and what is of none."""
    means = shares.mean(axis=1) / 255 * 100
    return [f"{mean:.1f}" for mean in (*means, max(0.0, 100 - means.sum()))]
