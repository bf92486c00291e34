"""What a scenario may expect of a figure: absolute bounds, or bounds as a multiple of the same figure elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar, Self

from pydantic import Field, model_validator

from hvaqemu.fields import Config, Frequency, Name, Seconds, Size, complain
from hvaqemu.units import format_duration, format_frequency, format_size

Ratio = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Bounds(Config):
    """Bounds of a figure. Each kind of figure is a class below, which has ``max`` and ``min`` of its own type."""

    #: What ``of`` names.
    other: ClassVar[str]

    of: Name | None = None
    max_ratio: Ratio | None = None
    min_ratio: Ratio | None = None

    @staticmethod
    def shown(value: float) -> str:
        """A figure of this kind, for people."""
        raise NotImplementedError

    @property
    def limits(self) -> tuple[float | None, float | None]:
        """The least and the most."""
        raise NotImplementedError

    @model_validator(mode="after")
    def _some(self) -> Self:
        ratio = self.max_ratio is not None or self.min_ratio is not None
        if not ratio and self.limits == (None, None):
            complain(((), "needs max, min, max_ratio or min_ratio"))
        if ratio and self.of is None:
            complain(((), f"a ratio needs `of`, the name of another {self.other}"))
        if self.of is not None and not ratio:
            complain((("of",), "means nothing without max_ratio or min_ratio"))
        return self

    def violations(self, value: float, other: float | None) -> Iterator[str]:
        """What ``value`` breaks, each a phrase. ``other``: the same figure of what ``of`` names."""
        least, most = self.limits
        if most is not None and value > most:
            yield f"{self.shown(value)} is more than {self.shown(most)}"
        if least is not None and value < least:
            yield f"{self.shown(value)} is less than {self.shown(least)}"
        if other is None:
            return
        ratio = value / other if other else float("inf")
        if self.max_ratio is not None and ratio > self.max_ratio:
            yield f"{self.shown(value)} is {ratio:.3f} of {self.of}, more than {self.max_ratio:g}"
        if self.min_ratio is not None and ratio < self.min_ratio:
            yield f"{self.shown(value)} is {ratio:.3f} of {self.of}, less than {self.min_ratio:g}"

    def found(self, value: float, other: float | None) -> str:
        """``value``, and what it is of what ``of`` names."""
        return self.shown(value) + (f", {value / other:.3f} of {self.of}" if other else "")

    @property
    def title(self) -> str:
        """The bounds in a few words."""
        least, most = self.limits
        absolute = ((">=", least), ("<=", most))
        parts = [f"{sign} {_short(self.shown(limit))}" for sign, limit in absolute if limit is not None]
        ratios = ((">=", self.min_ratio), ("<=", self.max_ratio))
        parts += [f"{sign} {ratio:g} of {self.of}" for sign, ratio in ratios if ratio is not None]
        return " and ".join(parts)


def _short(figure: str) -> str:
    # What a user wrote has seldom a fraction.
    return figure.replace(".0 ", " ").replace(".0/", "/")


class SizeBounds(Bounds):
    """Bounds of a number of bytes, in a measure."""

    other = "measure"
    max: Size | None = None
    min: Size | None = None

    @staticmethod
    def shown(value: float) -> str:
        return format_size(value)

    @property
    def limits(self) -> tuple[float | None, float | None]:
        return self.min, self.max


class FrequencyBounds(Bounds):
    """Bounds of how much a load gets done in a second."""

    other = "load"
    max: Frequency | None = None
    min: Frequency | None = None

    @staticmethod
    def shown(value: float) -> str:
        return format_frequency(value)

    @property
    def limits(self) -> tuple[float | None, float | None]:
        return self.min, self.max


class LatencyBounds(Bounds):
    """Bounds of how long a load's requests take."""

    other = "load"
    max: Seconds | None = None
    min: Seconds | None = None

    @staticmethod
    def shown(value: float) -> str:
        return format_duration(value)

    @property
    def limits(self) -> tuple[float | None, float | None]:
        return self.min, self.max
