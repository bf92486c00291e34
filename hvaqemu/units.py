"""Sizes, durations, shares, rates and frequencies, parsed and printed in one place.

Sizes follow QEMU: ``K``, ``M``, ``G`` and ``T`` are powers of 1024, with or without ``iB``. Durations are seconds
unless they carry ``ms``, ``s``, ``m`` (``min``) or ``h``. A share always carries its ``%``, and a rate is a share and
the time it is for (``0.2%/min``): a bare number could be meant either way. A frequency counts events (``50/s``).
"""

from __future__ import annotations

import re
from decimal import Decimal

KiB = 1 << 10
MiB = 1 << 20
GiB = 1 << 30
TiB = 1 << 40

_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?\s*", re.IGNORECASE)
_SIZE_FACTOR = {"": 1, "K": KiB, "M": MiB, "G": GiB, "T": TiB}
#: What the kernel takes for a size (off_t).
SIZE_MOST = (1 << 63) - 1
_DURATION = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(us|ms|s|m|min|h)?\s*", re.IGNORECASE)
_DURATION_FACTOR = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}
_SHARE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*%\s*")
_RATE = re.compile(r"(.*)/\s*(s|min|h)\s*")
_FREQUENCY = re.compile(r"\s*(\d+(?:\.\d+)?)\s*/\s*(s|min|h)\s*")
_RATE_PER_MINUTE = {"s": Decimal(60), "min": Decimal(1), "h": 1 / Decimal(60)}


def parse_size(text: str | int) -> int:
    """Bytes in ``text`` ("512M", "1.5 GiB", 4096).

    :raise ValueError: not a size, negative, or not a whole number of bytes.
    """
    if isinstance(text, bool):
        raise ValueError(f"{text!r} is not a size; write for example 512M")
    match = _SIZE.fullmatch(str(text))
    if match is None:
        raise ValueError(f"{text!r} is not a size; write for example 512M or 2G")
    value = Decimal(match[1]) * _SIZE_FACTOR[match[2].upper()]
    if value > SIZE_MOST:
        raise ValueError(f"{str(text)[:40]!r} is more than there can be")
    if value != value.to_integral_value():
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


def parse_share(text: str) -> float:
    """What part of a whole ``text`` ("5%") is: 0.05.

    :raise ValueError: not a number and a ``%``.
    """
    return float(_percent(text, "5%") / 100)


def parse_rate(text: str) -> float:
    """What part of a whole goes in a minute, as ``text`` ("0.2%/min", "12%/h") says: 0.002.

    :raise ValueError: not a share and ``/s``, ``/min`` or ``/h``.
    """
    match = _RATE.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not a rate; write for example 0.2%/min")
    return float(_percent(match[1], "0.2%/min", text) / 100 * _RATE_PER_MINUTE[match[2]])


def parse_frequency(text: str) -> float:
    """Events a second in ``text`` ("50/s", "90/min").

    :raise ValueError: not a number and ``/s``, ``/min`` or ``/h``.
    """
    match = _FREQUENCY.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not a frequency; write for example 50/s")
    return float(match[1]) / _DURATION_FACTOR[match[2]]


def _percent(text: str, example: str, shown: str = "") -> Decimal:
    match = _SHARE.fullmatch(text)
    if match is None:
        raise ValueError(f"{shown or text!r} is not a share; write for example {example}")
    # Decimal, so that what is printed is parsed as the same number again.
    return Decimal(match[1])


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


def format_share(share: float) -> str:
    """``share`` of a whole as :func:`parse_share` takes it: "5%", every digit of it."""
    text = f"{Decimal(repr(share)) * 100:f}"
    return f"{text.rstrip('0').rstrip('.') if '.' in text else text}%"


def format_rate(rate: float) -> str:
    """``rate``, a share a minute, as :func:`parse_rate` takes it: "0.2%/min"."""
    return f"{format_share(rate)}/min"


def format_frequency(frequency: float) -> str:
    """``frequency``, events a second, for people: "49.8/s"."""
    return f"{frequency:.1f}/s" if frequency < 1000 else f"{frequency:,.0f}/s"
