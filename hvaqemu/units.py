"""Sizes and durations, parsed and printed in one place.

Sizes follow QEMU: ``K``, ``M``, ``G`` and ``T`` are powers of 1024, with or without ``iB``. Durations are seconds
unless they carry ``ms``, ``s``, ``m`` (``min``) or ``h``.
"""

from __future__ import annotations

import re

KiB = 1 << 10
MiB = 1 << 20
GiB = 1 << 30
TiB = 1 << 40

_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?\s*", re.IGNORECASE)
_SIZE_FACTOR = {"": 1, "K": KiB, "M": MiB, "G": GiB, "T": TiB}
_DURATION = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(us|ms|s|m|min|h)?\s*", re.IGNORECASE)
_DURATION_FACTOR = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}


def parse_size(text: str | int) -> int:
    """Bytes in ``text`` ("512M", "1.5 GiB", 4096).

    :raise ValueError: not a size, negative, or not a whole number of bytes.
    """
    if isinstance(text, bool):
        raise ValueError(f"{text!r} is not a size; write for example 512M")
    match = _SIZE.fullmatch(str(text))
    if match is None:
        raise ValueError(f"{text!r} is not a size; write for example 512M or 2G")
    value = float(match[1]) * _SIZE_FACTOR[match[2].upper()]
    if value != int(value):
        raise ValueError(f"{text!r} is not a whole number of bytes")
    return int(value)


def parse_duration(text: str | float) -> float:
    """Seconds in ``text`` ("200ms", "2m", 1.5).

    :raise ValueError: not a duration, or negative.
    """
    if isinstance(text, bool):
        raise ValueError(f"{text!r} is not a duration; write for example 200ms or 30s")
    match = _DURATION.fullmatch(str(text))
    if match is None:
        raise ValueError(f"{text!r} is not a duration; write for example 200ms, 30s or 2m")
    return float(match[1]) * _DURATION_FACTOR[(match[2] or "s").lower()]


def format_size(size: float) -> str:
    """``size`` bytes for people: "512 B", "3.4 MiB"."""
    for unit, factor in (("TiB", TiB), ("GiB", GiB), ("MiB", MiB), ("KiB", KiB)):
        if abs(size) >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size:.0f} B"


def format_duration(seconds: float) -> str:
    """``seconds`` for people: "12 µs", "3.4 ms", "1.2 s", "2 min 5 s"."""
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f} µs"
    if seconds < 1:
        return f"{seconds * 1e3:.1f} ms"
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s"
