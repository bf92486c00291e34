"""The report as a picture: backing and residences over time, page states as the guest sees them, refaults."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, MultipleLocator
from numpy.typing import NDArray

from hva_host.agent.model import Sample
from hva_host.report.model import Outcome, ScenarioReport, StepRecord
from hvaqemu.pages import PAGE_SIZE
from hvaqemu.units import MiB

Series = NDArray[np.float64]

_DPI = 130
_INK = "#222222"
_FAINT = "#767676"
#: Told apart in grey too, and by eyes that mix up red and green.
_RESIDENCES = {"backing (resident)": "#0b5394", "discarded: in a layer": "#f2b134", "discarded: zero": "#d9d9d9"}
_PRESERVED = {"discarded: in the compressed store": "#8e63a8"}
_STATES = {"stable": "#0b5394", "potential": "#8e63a8", "volatile": "#f2b134", "unused": "#d9d9d9"}
_REFAULTS = "#b3372f"
_SHADE = "#2e8b57"


@dataclass(frozen=True)
class _Span:
    begin: float
    end: float
    label: str


def draw(report: ScenarioReport) -> bytes:
    """The picture as PNG. A report without samples gives one that says so."""
    figure = Figure(figsize=(12.5, 8.2), dpi=_DPI, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    name = str(_vm(report).get("name", "VM"))
    if len(report.timeline) < 2:
        figure.text(0.5, 0.5, f"{name}: the run ended before there was anything to show", ha="center", color=_INK)
        return _png(figure)
    figure.suptitle(_title(report, name), x=0.01, ha="left", fontsize=13, fontweight="bold", color=_INK)
    axes: Sequence[Axes] = figure.subplots(3, 1, sharex=True, height_ratios=[3.4, 2.6, 1.0])
    memory, states, refaults = axes
    at = np.array([sample.at_s for sample in report.timeline])
    _memory(memory, report, at)
    _states(states, report, at)
    _refaults(refaults, report.timeline, at)
    for each in axes:
        _dress(each)
        _shade(each, _spans(report, float(at[-1])))
    memory.set_xlim(float(at[0]), float(at[-1]))
    _mark(memory, report, axes)
    refaults.set_xlabel("seconds since the VM started", fontsize=11, color=_INK)
    return _png(figure)


def _png(figure: Figure) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png")
    return out.getvalue()


def _vm(report: ScenarioReport) -> dict[str, Any]:
    """The VM's configuration, as far as the report has it."""
    return dict(report.configuration.get("scenario", {}).get("vm", {}))


def _title(report: ScenarioReport, name: str) -> str:
    vm = _vm(report)
    parts = [name]
    if memory := vm.get("memory"):
        parts.append(f"{memory // MiB} MiB")
    if machine := vm.get("machine"):
        parts.append(f"{machine} on {str(vm.get('accelerator', '')).upper()}")
    parts.append("passed" if report.ok else "FAILED")
    return " · ".join(parts)


def _mib(pages: Sequence[int]) -> Series:
    return np.array(pages, dtype=np.float64) * PAGE_SIZE / MiB


def _memory(axes: Axes, report: ScenarioReport, at: Series) -> None:
    samples = report.timeline
    backing = np.array([sample.backing_bytes for sample in samples], dtype=np.float64) / MiB
    layer = _mib([sample.layer_pages for sample in samples])
    zero = _mib([sample.zero_pages for sample in samples])
    series, looks = [backing, layer, zero], dict(_RESIDENCES)
    if any(sample.preserved_pages for sample in samples):
        series.append(_mib([sample.preserved_pages for sample in samples]))
        looks.update(_PRESERVED)
    axes.stackplot(at, *series, labels=list(looks), colors=list(looks.values()), lw=0)
    axes.set_ylabel("guest RAM, MiB", fontsize=11, color=_INK)
    _scale(axes, report, float(np.sum(series, axis=0).max()))
    _legend(axes)


def _states(axes: Axes, report: ScenarioReport, at: Series) -> None:
    layers = [_mib([sample.states.get(state, 0) for sample in report.timeline]) for state in _STATES]
    axes.stackplot(at, *layers, labels=list(_STATES), colors=list(_STATES.values()), lw=0, step="post")
    axes.set_ylabel("guest's newest scan, MiB", fontsize=11, color=_INK)
    total = float(np.sum(layers, axis=0).max())
    _scale(axes, report, total)
    if not total:
        axes.text(0.5, 0.5, "no scan was made", transform=axes.transAxes, ha="center", color=_FAINT)
    _legend(axes)


def _refaults(axes: Axes, samples: Sequence[Sample], at: Series) -> None:
    pages = _mib([sample.refault_pages for sample in samples])
    # A pager that was started anew counts from zero again.
    gained = np.maximum(np.diff(pages, prepend=pages[0]), 0)
    rate = gained / np.maximum(np.diff(at, prepend=at[0] - 1), 1e-3)
    axes.fill_between(at, rate, color=_REFAULTS, lw=0, step="pre", label="refaulted")
    axes.set_ylabel("MiB/s", fontsize=11, color=_INK)
    axes.set_ylim(0, float(rate.max()) * 1.1 or 1)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))
    _legend(axes)


def _scale(axes: Axes, report: ScenarioReport, highest: float) -> None:
    """All of the guest's RAM, in quarters."""
    memory = int(_vm(report).get("memory", 0)) / MiB or highest or 1.0
    axes.set_ylim(0, max(memory, highest) * 1.03)
    axes.yaxis.set_major_locator(MultipleLocator(memory / 4))


def _legend(axes: Axes) -> None:
    # Beside the data, in the order of the stack.
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(
        handles[::-1], labels[::-1], loc="upper left", bbox_to_anchor=(1.005, 1.0), frameon=False, fontsize=10,
        labelcolor=_INK, borderaxespad=0.2,
    )  # fmt: skip


def _dress(axes: Axes) -> None:
    axes.tick_params(labelsize=10, colors=_INK, length=3)
    axes.grid(axis="y", color="white", alpha=0.45, lw=0.8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(_FAINT)


def _spans(report: ScenarioReport, end: float) -> list[_Span]:
    """When epochs ran: each reclaim step, and each reclaim beside other steps until it was stopped."""
    spans: list[_Span] = []
    begun: StepRecord | None = None
    for step in report.steps:
        if step.verb != "reclaim" or step.at_s is None:
            continue
        if begun is not None and begun.at_s is not None:
            spans.append(_Span(begun.at_s, step.at_s + step.seconds, begun.title))
            begun = None
        elif " every " in step.title and step.outcome is Outcome.OK:
            begun = step
        else:
            spans.append(_Span(step.at_s, step.at_s + step.seconds, "reclaim"))
    if begun is not None and begun.at_s is not None:
        spans.append(_Span(begun.at_s, end, begun.title))
    return spans


def _shade(axes: Axes, spans: Sequence[_Span]) -> None:
    for span in spans:
        # Behind the data, whose colours must stay the legend's; the bar shows where data fills the axes.
        axes.axvspan(span.begin, span.end, color=_SHADE, alpha=0.14, lw=0, zorder=-1)
        axes.axvspan(span.begin, span.end, ymin=0.975, ymax=1.0, color=_SHADE, lw=0)


def _mark(top: Axes, report: ScenarioReport, axes: Sequence[Axes]) -> None:
    """A line through all axes at each measure, its name and backing above; in green above where epochs ran."""
    left, right = top.get_xlim()
    per_letter = (right - left) / 125
    labels = [(span.begin, span.label, _SHADE) for span in _spans(report, right)]
    for name, measure in report.measures.items():
        labels.append((measure.uptime_s, f"{name} {measure.backing_bytes / MiB:.0f}", _INK))
        for each in axes:
            each.axvline(measure.uptime_s, color=_INK, lw=1.0, ls=(0, (4, 3)))
    placed = []
    for at, label, color in labels:
        width = (len(label) + 2) * per_letter
        if not left <= at <= right:
            # Sampling failed there; a label outside would squeeze the axes.
            continue
        # Near the right edge a label ends at its line instead of beginning there.
        side = "right" if at + width > right and at - width >= left else "left"
        begin = at if side == "left" else at - width
        placed.append((begin, begin + width, side, at, label, color))
    rows: list[float] = []
    for begin, end, side, at, label, color in sorted(placed):
        # The lowest row with room: labels never lie over one another.
        row = next((number for number, taken in enumerate(rows) if taken <= begin), len(rows))
        rows[row : row + 1] = [end]
        top.annotate(
            label, (at, 1.0), xycoords=("data", "axes fraction"), xytext=(1 if side == "left" else -1, 5 + 14 * row),
            textcoords="offset points", fontsize=10, color=color, ha=side, va="bottom", annotation_clip=False,
        )  # fmt: skip
