"""What a comparison found: table, page, picture and JSON all come from here. Sizes are bytes, times seconds."""

from __future__ import annotations

from hva_host.agent.model import Measure, Record
from hva_host.compare.method import Begin, Method
from hva_host.report.model import ScenarioReport


class GuestPoint(Record):
    """What a guest said of its memory at a moment; None where it does not tell."""

    #: Seconds since the VM started.
    at_s: float
    free_bytes: int | None
    available_bytes: int | None
    #: The least of this word and of those after it that have no point of their own.
    least_free_bytes: int | None
    least_available_bytes: int | None

    def with_next(self, other: GuestPoint) -> GuestPoint:
        """This point, where ``other`` comes after it and gets none."""
        return self.model_copy(
            update={
                "least_free_bytes": _least(self.least_free_bytes, other.least_free_bytes),
                "least_available_bytes": _least(self.least_available_bytes, other.least_available_bytes),
            }
        )


def _least(*sizes: int | None) -> int | None:
    return min((size for size in sizes if size is not None), default=None)


class GuestCounters(Record):
    """Events in a guest's own memory management, by its /proc/vmstat."""

    #: Pages that the guest's kernel read again after it had let go of them: of files, and of swap.
    refault_file: int
    refault_anon: int
    #: Faults for which the guest read from a disk.
    major_faults: int

    def since(self, before: GuestCounters) -> GuestCounters:
        """What has come since ``before``."""
        return GuestCounters(
            refault_file=self.refault_file - before.refault_file,
            refault_anon=self.refault_anon - before.refault_anon,
            major_faults=self.major_faults - before.major_faults,
        )


class CpuSeconds(Record):
    """Processor time of the host's that the steps took, from the guest's first answer to their end."""

    qemu: float
    pager: float
    #: This process: what a host agent does, and playing and measuring the scenario.
    agent: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.qemu + self.pager + self.agent


class Probe(Record):
    """Whether a method does anything on this guest."""

    #: None: that could not be found out.
    works: bool | None
    #: What was seen, one printable line.
    why: str


class MethodRun(Record):
    """A scenario under one method."""

    method: Method
    #: Titles of the scenario's steps that were not played.
    left_out: list[str] = []
    begin: Begin = Begin()
    #: None: the VM could not be launched.
    report: ScenarioReport | None = None
    #: Why it could not, one printable line, or "".
    error: str = ""
    #: What went wrong beside the steps, printable, one line each.
    failures: list[str] = []
    #: What a reader of the figures has to know, printable, one line each.
    remarks: list[str] = []
    guest: list[GuestPoint] = []
    #: The VM when the guest first answered, and at the end of the steps; None where it did not answer then.
    first: Measure | None = None
    last: Measure | None = None
    #: What came in the guest between the two.
    counters: GuestCounters | None = None
    #: Processes that the guest's kernel killed for want of memory.
    oom_kills: int | None = None
    #: The guest did not answer: they are those that its console tells of.
    oom_kills_at_least: bool = False
    #: None where there was nothing to find out.
    probe: Probe | None = None

    @property
    def broken(self) -> str:
        """Why the method does not work on this guest, or ""."""
        return self.probe.why if self.probe is not None and self.probe.works is False else ""

    @property
    def ok(self) -> bool:
        """Whether all it was to hold did, where it works."""
        return not self.failures and (bool(self.broken) or (self.report is not None and self.report.ok))


class ComparisonReport(Record):
    """The runs, in the order they were made."""

    source: str
    runs: list[MethodRun]
    #: The signal that ended the comparison early, or "".
    interrupted: str = ""
    #: Why it ended early otherwise, one printable line, or "".
    stopped: str = ""
    #: Methods that it had not come to, or not to the end of.
    not_run: list[Method] = []

    @property
    def ok(self) -> bool:
        """Whether every method that works did all the work, and every byte stayed the same."""
        early = self.interrupted or self.stopped or self.not_run
        return not early and all(run.ok for run in self.runs)
