"""A comparison as a picture: host memory over time, and what the guest still had available."""

from __future__ import annotations

import io

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from hva_host.compare.model import ComparisonReport, MethodRun
from hva_host.compare.window import occupied
from hvaqemu.units import MiB

_INK, _FAINT = "#222222", "#767676"
#: Told apart in grey too: by colour and by dashes, the same as on the page.
_LOOKS = (("#0b5394", "-"), ("#d55e00", (0, (9, 3))), ("#0b8a66", (0, (3, 2))), ("#8e63a8", (0, (12, 3, 3, 3))))


def draw(report: ComparisonReport) -> bytes:
    """The picture as PNG."""
    figure = Figure(figsize=(12.0, 7.0), dpi=130, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    memory, guest = figure.subplots(2, 1, sharex=True, height_ratios=[2.2, 1.0])
    for run, (color, dashes) in zip(report.runs, _LOOKS, strict=False):
        timeline = run.report.timeline if run.report is not None else []
        # How long a guest took to boot is no method's doing.
        begin = timeline[0].at_s if timeline else 0.0
        look = {"color": color, "linestyle": dashes, "alpha": 0.4 if run.broken else 1.0, "lw": 1.8}
        memory.plot(
            [at.at_s - begin for at in timeline], [occupied(at) / MiB for at in timeline], label=_label(run), **look
        )
        told = [(at.at_s - begin, at.available_bytes / MiB) for at in run.guest if at.available_bytes is not None]
        guest.plot([at for at, _ in told], [size for _, size in told], **look)
    memory.set_ylabel("backing and store, MiB", color=_INK)
    guest.set_ylabel("available in the guest, MiB", color=_INK)
    guest.set_xlabel("seconds since the guest answered", color=_INK)
    for axes in (memory, guest):
        _dress(axes)
    if report.runs:
        memory.legend(loc="upper left", bbox_to_anchor=(1.005, 1.0), frameon=False, labelcolor=_INK)
    out = io.BytesIO()
    figure.savefig(out, format="png")
    return out.getvalue()


def _label(run: MethodRun) -> str:
    return f"{run.method}\n(not working here)" if run.broken else str(run.method)


def _dress(axes: Axes) -> None:
    axes.set_ylim(bottom=0)
    axes.tick_params(colors=_INK, length=3)
    axes.grid(axis="y", color=_FAINT, alpha=0.25, lw=0.8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
