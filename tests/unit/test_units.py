"""Sizes and durations."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvaqemu.units import (
    GiB,
    KiB,
    MiB,
    format_duration,
    format_rate,
    format_share,
    format_size,
    parse_duration,
    parse_rate,
    parse_share,
    parse_size,
)


@pytest.mark.parametrize(
    ("text", "size"),
    [("512M", 512 * MiB), ("1.5G", GiB + GiB // 2), ("4 KiB", 4 * KiB), ("7", 7), (4096, 4096), ("2gb", 2 * GiB)],
)
def test_sizes(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "M", "-1M", "1.0001", "12 parsecs", True, "1e3", "0x10", "9" * 400, "8388608T"])
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


@pytest.mark.parametrize(("text", "share"), [("5%", 0.05), ("0.2 %", 0.002), ("100%", 1.0), ("0%", 0.0)])
def test_shares(text: str, share: float) -> None:
    assert parse_share(text) == share


@pytest.mark.parametrize(("text", "rate"), [("0.2%/min", 0.002), ("12%/h", 0.002), ("1 % / s", 0.6)])
def test_rates(text: str, rate: float) -> None:
    assert parse_rate(text) == pytest.approx(rate)


@pytest.mark.parametrize("text", ["", "5", "%", "-5%", "5%%", "1e3%", "nan%", "0.2%/min"])
def test_what_is_not_a_share(text: str) -> None:
    with pytest.raises(ValueError):
        parse_share(text)


@pytest.mark.parametrize("text", ["", "0.2%", "0.2/min", "0.2%/", "0.2%/day", "0.2%/min/min"])
def test_what_is_not_a_rate(text: str) -> None:
    with pytest.raises(ValueError):
        parse_rate(text)


@given(st.floats(0, 1))
def test_what_is_printed_is_parsed_as_the_same(share: float) -> None:
    assert parse_share(format_share(share)) == share
    assert parse_rate(format_rate(share)) == share


def test_shares_for_people() -> None:
    assert (format_share(0.05), format_share(1.0), format_rate(0.002)) == ("5%", "100%", "0.2%/min")
