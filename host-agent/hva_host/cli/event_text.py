"""An event as a line for people."""

from __future__ import annotations

from typing import Any

from hva_host.cli.text import one_line
from hvaqemu.units import format_duration, format_size

_LONGEST = 300
#: Sizes in bytes and times in seconds, by the key they have in an event's data.
_SIZES = frozenset({"bytes", "done", "size", "used", "budget"})
_SECONDS = frozenset({"seconds"})


def describe(event: str, data: dict[str, Any]) -> str:
    """What happened, without when and to whom, harmless for a terminal."""
    try:
        if event == "EPOCH":
            return _epoch(data["stats"])
        if event == "VM_STATE":
            return _cut(str(data["state"]) + (f": {data['reason']}" if data["reason"] else ""))
        if event == "VM_HELD":
            return _cut("; ".join(f"{held['layer']}: {held['reason']}" for held in data["held"]))
    except (KeyError, TypeError, ValueError):
        # Written by another version.
        pass
    shown = [f"{key} {_value(key, value)}" for key, value in data.items() if key != "name" and value != ""]
    return _cut(", ".join(shown))


def _epoch(stats: dict[str, Any]) -> str:
    text = f"{stats['number']}: {stats['discarded']:,} of {stats['candidates']:,} candidates discarded"
    text += f" in {format_duration(float(stats['seconds']['total']))}"
    return _cut(f"{text} ({stats['note']})" if stats.get("note") else text)


def _value(key: str, value: object) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        if key in _SIZES:
            return format_size(value)
        if key in _SECONDS:
            return format_duration(value)
    return str(value)


def _cut(text: str) -> str:
    text = one_line(text)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}\u2026"
