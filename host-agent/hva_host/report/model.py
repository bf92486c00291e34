"""What a run of a scenario found; everything the table, the JSON file and the picture show comes from here."""

from __future__ import annotations

import enum
from typing import Any

from hva_host.agent.model import EpochStats, Measure, Record, Sample, StallStats
from hva_host.agent.ram_frames import RamFrame
from hva_host.load.model import LoadResult


class Outcome(enum.StrEnum):
    """How a step ended."""

    OK = "ok"
    FAILED = "failed"
    #: A step before it ended the scenario.
    NOT_RUN = "not run"


class StepRecord(Record):
    """One step, as it went."""

    #: Counts from 1.
    number: int
    #: The verb of the scenario file.
    verb: str
    #: The step in a few words, printable.
    title: str
    outcome: Outcome
    #: Seconds since the VM started; None where the step was not run.
    at_s: float | None = None
    seconds: float = 0.0
    #: What came of it in a few words, printable.
    figures: str = ""


class ScenarioReport(Record):
    """A run from launch to shut-down."""

    #: What went wrong, in order; printable, one line each. Empty: every step and expectation held.
    failures: list[str] = []
    #: The signal that ended the run early, or "".
    interrupted: str = ""
    #: Standard output of the guest's commands. The guest's text: escape it before printing.
    saved: dict[str, str] = {}
    measures: dict[str, Measure] = {}
    steps: list[StepRecord] = []
    #: What came of loads on services in the guest.
    loads: dict[str, LoadResult] = {}
    epochs: list[EpochStats] = []
    stalls: StallStats = StallStats()
    #: Seconds from the call until the guest agent was connected, image building included.
    launch_s: float = 0.0
    total_s: float = 0.0
    #: How the VM ended, or that it was kept.
    ended: str = ""
    #: The scenario and where it was read from.
    configuration: dict[str, Any] = {}
    #: Of what took part: hvaqemu, Python, QEMU, kernels.
    versions: dict[str, str] = {}
    #: The end of the guest's console, only after a failure; printable.
    console_tail: list[str] = []
    timeline: list[Sample] = []
    #: Maps of guest RAM, less often.
    ram: list[RamFrame] = []

    @property
    def ok(self) -> bool:
        """Whether every step and expectation held."""
        return not self.failures
