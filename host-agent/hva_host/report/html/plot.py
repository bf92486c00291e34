"""Axes, scales and areas of figures, as SVG. A figure is :data:`WIDTH` units wide, whatever it is shown at."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from xml.etree.ElementTree import Element

import numpy as np
from numpy.typing import NDArray

from hva_host.report.html.elements import Part, element

Series = NDArray[np.float64]

WIDTH = 1000.0
LEFT, RIGHT = 62.0, 14.0


@dataclass(frozen=True)
class Scale:
    """From values to places: ``low`` is at ``begin``, ``high`` at ``end``."""

    low: float
    high: float
    begin: float
    end: float

    def __call__(self, value: float) -> float:
        span = self.high - self.low
        return self.begin + (value - self.low) / span * (self.end - self.begin) if span else self.begin

    def ticks(self, most: int) -> list[float]:
        """At most ``most`` + 1 round values in the scale."""
        step = round_step((self.high - self.low) / most) if self.high > self.low else 1.0
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [number * step for number in range(first, last + 1)]


def round_step(least: float) -> float:
    """The least of 1, 2, 5, 10, 20, … that is at least ``least``."""
    power = 10.0 ** math.floor(math.log10(least)) if least > 0 else 1.0
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= least * (1 - 1e-9))


@dataclass(frozen=True)
class Panel:
    """One pair of axes."""

    x: Scale
    y: Scale

    @property
    def top(self) -> float:
        return min(self.y.begin, self.y.end)

    @property
    def bottom(self) -> float:
        return max(self.y.begin, self.y.end)

    def frame(self, title: str, label: Callable[[float], str], ticks: Iterable[float]) -> list[Element]:
        """The y axis with its grid, its title above."""
        left, right = fixed(self.x.begin), fixed(self.x.end)
        parts = [element("text", {"class": "axis-title", "x": left, "y": fixed(self.top - 6)}, title)]
        for tick in ticks:
            y = fixed(self.y(tick))
            place = {"x": fixed(self.x.begin - 6), "y": y, "dy": "0.35em", "text-anchor": "end"}
            parts += [
                element("line", {"class": "grid", "x1": left, "x2": right, "y1": y, "y2": y}),
                element("text", {"class": "tick", **place}, label(tick)),
            ]
        return parts

    def foot(self, label: Callable[[float], str], ticks: Iterable[float], title: str = "") -> list[Element]:
        """The x axis."""
        bottom = fixed(self.bottom)
        parts = [
            element(
                "line",
                {"class": "axis", "x1": fixed(self.x.begin), "x2": fixed(self.x.end), "y1": bottom, "y2": bottom},
            )
        ]
        for tick in ticks:
            x = fixed(self.x(tick))
            parts += [
                element("line", {"class": "axis", "x1": x, "x2": x, "y1": bottom, "y2": fixed(self.bottom + 4)}),
                element(
                    "text",
                    {"class": "tick", "x": x, "y": fixed(self.bottom + 18), "text-anchor": "middle"},
                    label(tick),
                ),
            ]
        if title:
            middle = fixed((self.x.begin + self.x.end) / 2)
            place = {"class": "axis-title", "x": middle, "y": fixed(self.bottom + 36), "text-anchor": "middle"}
            parts.append(element("text", place, title))
        return parts

    def line_at(self, x: float, look: str) -> Element:
        """A line from top to bottom."""
        at = fixed(self.x(x))
        return element("line", {"class": look, "x1": at, "x2": at, "y1": fixed(self.top), "y2": fixed(self.bottom)})

    def area(self, at: Series, lower: Series, upper: Series, look: str) -> Element:
        """What lies between two curves."""
        path = [f"{fixed(self.x(x))},{fixed(self.y(y))}" for x, y in zip(at, upper, strict=True)]
        path += [f"{fixed(self.x(x))},{fixed(self.y(y))}" for x, y in zip(at[::-1], lower[::-1], strict=True)]
        return element("polygon", {"class": look, "points": " ".join(path)})

    def stack(self, at: Series, layers: Sequence[tuple[str, Series]]) -> list[Element]:
        """Areas on top of one another, the first at the bottom."""
        parts, lower = [], np.zeros_like(at)
        for look, layer in layers:
            upper = lower + layer
            if layer.any():
                parts.append(self.area(at, lower, upper, look))
            lower = upper
        return parts

    def curve(self, at: Series, values: Series, look: str) -> Element:
        """A line through points."""
        points = " ".join(f"{fixed(self.x(x))},{fixed(self.y(y))}" for x, y in zip(at, values, strict=True))
        return element("polyline", {"class": look, "points": points})


def steps(at: Series, values: Series) -> tuple[Series, Series]:
    """A curve that keeps each value until the next one, as one that goes straight from point to point."""
    return np.repeat(at, 2)[1:], np.repeat(values, 2)[:-1]


def drawing(identifier: str, height: float, title: str, says: str, parts: Iterable[Part]) -> Element:
    """A figure.

    :param says: what it shows, in a sentence, for who does not see it.
    """
    names = (f"{identifier}-title", f"{identifier}-says")
    attributes = {
        "id": identifier,
        "class": "plot",
        "viewBox": f"0 0 {WIDTH:.0f} {height:.0f}",
        "role": "img",
        "aria-labelledby": " ".join(names),
    }
    title_, says_ = element("title", {"id": names[0]}, title), element("desc", {"id": names[1]}, says)
    return element("svg", attributes, title_, says_, *parts)


def fixed(value: float) -> str:
    """A coordinate, short."""
    return f"{value:.1f}".removesuffix(".0")


def seconds_label(span: float) -> tuple[Callable[[float], str], str]:
    """How moments of a time axis are written that is ``span`` seconds long, and the axis's title."""
    unit, name = _unit(span)
    return (lambda at: f"{at / unit:g}"), f"{name} since the VM started"


def _unit(span: float) -> tuple[float, str]:
    """What a time of ``span`` seconds is measured in: seconds of it, and its name."""
    return (3600.0, "hours") if span >= 7200 else (60.0, "minutes") if span >= 600 else (1.0, "seconds")


def time_ticks(scale: Scale) -> list[float]:
    """Round moments in a time axis."""
    unit, _ = _unit(scale.high - scale.low)
    inner = Scale(scale.low / unit, scale.high / unit, 0, 1)
    return [tick * unit for tick in inner.ticks(10)]
