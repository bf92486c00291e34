"""Memory that guests hold, over how many there are."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.density.model import Found
from benchmarks.figure import FOLDER
from hvaqemu.units import MiB

_PICTURE = Path("docs/images/density.png")


def draw(found: Iterable[Found], limit: int) -> None:
    """Draw each method into one picture, up to the last number of guests that all served."""
    figure = Figure(figsize=(9, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for each in found:
        numbers = [fit.guests for fit in each.fits]
        axes.plot(numbers, [fit.usage.held / MiB for fit in each.fits], "o-", label=f"{each.method}: {each.guests}")
    axes.axhline(limit / MiB, color="k", linestyle="--", label="limit")
    axes.set_xlabel("guests of 512 MiB, all serving")
    axes.set_ylabel("MiB held (page cache not counted)")
    axes.set_ylim(0)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    for path in (_PICTURE, FOLDER / "density.png"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(buffer.getvalue())
