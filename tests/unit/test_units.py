"""Sizes and durations."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvaqemu.units import GiB, KiB, MiB, format_duration, format_size, parse_duration, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [("512M", 512 * MiB), ("1.5G", GiB + GiB // 2), ("4 KiB", 4 * KiB), ("7", 7), (4096, 4096), ("2gb", 2 * GiB)],
)
def test_sizes(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "M", "-1M", "1.0001", "12 parsecs", True, "1e3", "0x10"])
def test_what_is_not_a_size(text: str | int) -> None:
    with pytest.raises(ValueError):
        parse_size(text)


@given(st.integers(0, 1 << 60))
def test_a_number_is_its_own_size(size: int) -> None:
    assert parse_size(size) == parse_size(str(size)) or size > 1 << 53


@pytest.mark.parametrize(
    ("text", "seconds"), [("200ms", 0.2), ("2m", 120.0), ("30s", 30.0), (1.5, 1.5), ("1h", 3600.0)]
)
def test_durations(text: str | float, seconds: float) -> None:
    assert parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "ms", "-1s", "soon", False])
def test_what_is_not_a_duration(text: str | float) -> None:
    with pytest.raises(ValueError):
        parse_duration(text)


def test_for_people() -> None:
    assert format_size(512) == "512 B"
    assert format_size(90 * MiB) == "90.0 MiB"
    assert format_duration(0.0000123) == "12 µs"
    assert format_duration(0.0034) == "3.4 ms"
    assert format_duration(125) == "2 min 5 s"
