"""What a page shows of a run or of a VM, wherever it comes from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hva_host.agent.history import VmReport
from hva_host.agent.model import EpochStats, Measure, Sample, StallStats
from hva_host.agent.ram_frames import RamFrame
from hva_host.report.html.plot import Series
from hva_host.report.model import ScenarioReport, StepRecord
from hvaqemu.pages import PAGE_SIZE
from hvaqemu.units import MiB

#: Points that are drawn of a timeline; of more, those are left out that lie between the extremes of a stretch.
_DRAWN = 800
RESIDENCES = {"resident": "resident", "layer": "in a layer", "zero": "zero", "preserved": "in the store"}
STATES = ("stable", "potential", "volatile", "unused")


@dataclass(frozen=True)
class Shown:
    """One run, or one VM."""

    name: str
    #: "passed", "failed", or a VM's state.
    verdict: str
    #: None: nothing was to hold.
    ok: bool | None
    #: Bytes of guest RAM; 0 where that is not known.
    memory: int
    timeline: Sequence[Sample] = ()
    ram: Sequence[RamFrame] = ()
    measures: Mapping[str, Measure] = field(default_factory=dict)
    epochs: Sequence[EpochStats] = ()
    stalls: StallStats = field(default_factory=StallStats)
    steps: Sequence[StepRecord] = ()
    failures: Sequence[str] = ()
    console_tail: Sequence[str] = ()
    saved: Mapping[str, str] = field(default_factory=dict)
    configuration: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    total_s: float = 0.0


def of_run(report: ScenarioReport, name: str = "") -> Shown:
    """A run of a scenario.

    :param name: what to call it; "": by its VM.
    """
    vm: dict[str, Any] = dict(report.configuration.get("scenario", {}).get("vm", {}))
    return Shown(
        name=name or str(vm.get("name", "VM")),
        verdict="passed" if report.ok else "failed",
        ok=report.ok,
        memory=int(vm.get("memory", 0)),
        timeline=report.timeline,
        ram=report.ram,
        measures=report.measures,
        epochs=report.epochs,
        stalls=report.stalls,
        steps=report.steps,
        failures=report.failures,
        console_tail=report.console_tail,
        saved=report.saved,
        configuration=report.configuration,
        versions=report.versions,
        total_s=report.total_s,
    )


def of_vm(report: VmReport) -> Shown:
    """A VM that is up, since its host agent has it."""
    status = report.status
    return Shown(
        name=status.name,
        verdict=status.state,
        ok=None,
        memory=status.memory_bytes,
        timeline=report.timeline,
        ram=report.ram,
        measures={"now": status.measure} if status.measure is not None else {},
        epochs=status.epochs,
        stalls=status.stalls,
        failures=[text for text in (status.reason, status.reclaim_refused) if text],
        configuration=report.configuration,
        versions=report.versions,
    )


@dataclass(frozen=True)
class Curves:
    """A timeline as it is drawn, in MiB; all of shape ``(points,)``."""

    at: Series
    residences: dict[str, Series]
    store: Series
    states: dict[str, Series]
    #: MiB a second that came back.
    refaults: Series

    @property
    def occupied(self) -> Series:
        """Backing and store."""
        return self.residences["resident"] + self.store


def curves(samples: Sequence[Sample]) -> Curves:
    """The curves of a timeline of at least one sample."""
    drawn = _thinned(samples)

    def mib(values: list[int], factor: int = 1) -> Series:
        return np.array(values, dtype=np.float64) * factor / MiB

    at = np.array([sample.at_s for sample in drawn])
    back = mib([sample.refault_pages for sample in drawn], PAGE_SIZE)
    # A pager that was started anew may count from zero again.
    gained = np.maximum(np.diff(back, prepend=back[0]), 0)
    return Curves(
        at=at,
        residences={
            "resident": mib([sample.backing_bytes for sample in drawn]),
            "layer": mib([sample.layer_pages for sample in drawn], PAGE_SIZE),
            "zero": mib([sample.zero_pages for sample in drawn], PAGE_SIZE),
            "preserved": mib([sample.preserved_pages for sample in drawn], PAGE_SIZE),
        },
        store=mib([sample.store_bytes for sample in drawn]),
        states={state: mib([sample.states.get(state, 0) for sample in drawn], PAGE_SIZE) for state in STATES},
        refaults=gained / np.maximum(np.diff(at, prepend=at[0] - 1), 1e-3),
    )


def _thinned(samples: Sequence[Sample]) -> list[Sample]:
    """What is drawn: of each stretch of time the least and the most backing, so that no peak is lost."""
    if len(samples) <= _DRAWN:
        return list(samples)
    keep = {0, len(samples) - 1}
    for part in np.array_split(np.arange(len(samples)), _DRAWN // 2):
        backing = [samples[index].backing_bytes for index in part]
        keep |= {int(part[np.argmin(backing)]), int(part[np.argmax(backing)])}
    return [samples[index] for index in sorted(keep)]


@dataclass(frozen=True)
class Time:
    """The time that a page shows, in seconds since the VM started."""

    begin: float
    end: float


def time_of(reports: Sequence[Shown]) -> Time:
    """From the first to the last moment of any of them."""
    moments = [sample.at_s for shown in reports for sample in shown.timeline]
    moments += [frame.at_s for shown in reports for frame in shown.ram]
    begin, end = min(moments, default=0.0), max(moments, default=1.0)
    return Time(begin, max(end, begin + 1e-3))
