"""A VM under policy over time: backing, working set and refaults as a picture, its budget kept or not."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Picture

from hva_host.policy.decisions import View
from hvaqemu.pages import PAGE_SHIFT
from hvaqemu.units import MiB

_MINUTE = 60.0


@dataclass(frozen=True)
class Point:
    """One look at a VM, and what policy thought of it. Seconds and bytes.

    :ivar used: what its programs really use.
    """

    at_s: float
    backing: int
    used: int
    view: View


def seconds_over_budget(points: Sequence[Point]) -> float:
    """How long refaults were above their budget."""
    return sum(
        later.at_s - point.at_s
        for point, later in pairwise(points)
        if point.view.refault_rate is not None
        and point.view.budget is not None
        and point.view.refault_rate > point.view.budget
    )


def draw(points: Sequence[Point], begins: Sequence[float], title: str, used: str, paths: Sequence[Path]) -> None:
    """Write the picture to each of ``paths``.

    :param begins: seconds at which phases begin.
    :param used: what :attr:`Point.used` is.
    """
    picture = Picture(figsize=(9, 5.5), dpi=120, layout="constrained")
    FigureCanvasAgg(picture)
    memory, rate = picture.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    minutes = [point.at_s / _MINUTE for point in points]
    memory.plot(minutes, [point.backing / MiB for point in points], label="backing")
    known = [
        (at, point.view.working_set)
        for at, point in zip(minutes, points, strict=True)
        if point.view.working_set is not None
    ]
    memory.plot(
        [at for at, _ in known], [(pages << PAGE_SHIFT) / MiB for _, pages in known], label="working set, as estimated"
    )
    memory.plot(minutes, [point.used / MiB for point in points], "k:", label=used)
    memory.set_ylabel("MiB")
    memory.set_ylim(0, 640)
    memory.legend(loc="upper center")
    memory.set_title(title)
    seen = [(at, point.view.refault_rate, point.view.budget) for at, point in zip(minutes, points, strict=True)]
    rates = [(at, found, most) for at, found, most in seen if found is not None and most is not None]
    rate.plot([at for at, _, _ in rates], [found for _, found, _ in rates], label="refaults a minute")
    rate.plot([at for at, _, _ in rates], [most for _, _, most in rates], "r--", label="budget")
    rate.set_yscale("symlog", linthresh=100)
    rate.set_ylim(0)
    rate.legend(loc="upper right")
    rate.set_xlabel("minutes")
    for axes in (memory, rate):
        axes.grid(alpha=0.3)
        for begin in begins:
            axes.axvline(begin / _MINUTE, color="grey", alpha=0.4)
    buffer = io.BytesIO()
    picture.savefig(buffer, format="png")
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(buffer.getvalue())
