"""What came of a soak, as a value, a table and JSON."""

from __future__ import annotations

import statistics
from bisect import bisect_right
from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict
from rich.console import Console
from rich.table import Table

from hvaqemu.units import format_duration
from tests.vm.board import Gap

#: Lengths, in seconds, from which on the guest's gaps are counted.
_LENGTHS = (0.03, 0.1, 0.3, 1.0, 3.0)
#: The last touch before a death may have been this long before it, in seconds.
_BEFORE = 0.1
_WORST = 8
SEVERAL = "several of these in one pause"


class Pauses(BaseModel):
    """What the guest saw of one kind of deed: how often it was done, and the longest gap after each. Seconds."""

    model_config = ConfigDict(frozen=True)

    times: int
    median_s: float
    longest_s: float


def _deed_of(deeds: Sequence[tuple[float, str]], gap: Gap) -> int:
    """The place of the last deed before a gap began; -1 where there is none."""
    return bisect_right(deeds, gap.began + _BEFORE, key=lambda deed: deed[0]) - 1


def by_deed(deeds: Sequence[tuple[float, str]], gaps: Sequence[Gap]) -> dict[str, Pauses]:
    """What the guest saw of each kind of deed.

    :param deeds: time and kind of each, oldest first. A gap belongs to the last deed before it began; a deed after
        which no gap was long enough to be told of counts as 0. Gaps in which more was done are a kind of their own.
    """
    longest = [0.0] * len(deeds)
    found: dict[str, list[float]] = {}
    for gap in gaps:
        place = _deed_of(deeds, gap)
        if place + 1 < len(deeds) and deeds[place + 1][0] < gap.began + gap.seconds:
            found.setdefault(SEVERAL, []).append(gap.seconds)
        elif place >= 0:
            longest[place] = max(longest[place], gap.seconds)
    for (_, kind), seconds in zip(deeds, longest, strict=True):
        found.setdefault(kind, []).append(seconds)
    return {
        kind: Pauses(times=len(each), median_s=statistics.median(each), longest_s=max(each))
        for kind, each in sorted(found.items())
    }


def by_length(gaps: Sequence[Gap]) -> dict[str, int]:
    """How many gaps were at least so long."""
    return {f"{length:g}": sum(gap.seconds >= length for gap in gaps) for length in _LENGTHS}


def worst(deeds: Sequence[tuple[float, str]], gaps: Sequence[Gap], began: float) -> list[str]:
    """The longest gaps, with when they were (seconds after ``began``) and what was done before and in them."""
    said = []
    for gap in sorted(gaps, key=lambda gap: -gap.seconds)[:_WORST]:
        first = max(0, _deed_of(deeds, gap))
        told = [
            f"{kind} at {moment - began:.2f} s" for moment, kind in deeds[first:] if moment < gap.began + gap.seconds
        ]
        said.append(f"{gap.seconds:.2f} s from {gap.began - began:.2f} s on: {', '.join(told)}")
    return said


class Outcome(BaseModel):
    """Everything a soak found."""

    model_config = ConfigDict(frozen=True)

    seed: int
    seconds: float
    #: What was wrong; nothing may be.
    problems: list[str]
    #: Processes that died of SIGKILL, by who they were.
    kills: dict[str, int]
    deeds: dict[str, Pauses]
    epochs: int
    refaults: int
    refault_pages: int
    discarded_pages: int
    pager_restarts: int
    #: As the host agent measures it: from the moment it saw the pager's death.
    pager_pause_s: float
    #: As the guest measures it; includes whatever stood still on purpose, or because nobody had started a host agent.
    guest_pause_s: float
    #: Gaps the guest saw that were at least so long, in seconds.
    guest_gaps: dict[str, int]
    guest_worst: list[str]
    #: Rounds of the guest's workers, each of which verifies what it uses.
    verified: dict[str, int]
    #: The user's commands.
    commands: dict[str, int]
    errors: dict[str, int]

    @property
    def ok(self) -> bool:
        return not self.problems


def show(outcome: Outcome) -> None:
    """Print the outcome as tables."""
    console = Console(width=110)
    deeds = Table(title=f"soak, seed {outcome.seed}, {outcome.seconds:.0f} s", title_justify="left")
    for column in ("deed", "times", "guest's pause, median", "longest"):
        deeds.add_column(column, justify="left" if column == "deed" else "right")
    for kind, pauses in outcome.deeds.items():
        median, longest = format_duration(pauses.median_s), format_duration(pauses.longest_s)
        deeds.add_row(kind, str(pauses.times), median, longest)
    console.print(deeds)
    totals = Table(show_header=False)
    for name, text in (
        ("kills survived", ", ".join(f"{who} {count:,}" for who, count in outcome.kills.items())),
        ("epochs", f"{outcome.epochs:,}, {outcome.discarded_pages:,} pages discarded"),
        ("refaults", f"{outcome.refaults:,}, {outcome.refault_pages:,} pages"),
        ("pager restarts", f"{outcome.pager_restarts:,}, longest {format_duration(outcome.pager_pause_s)}"),
        ("longest pause in the guest", format_duration(outcome.guest_pause_s)),
        ("gaps in the guest", ", ".join(f"{count:,} from {length} s" for length, count in outcome.guest_gaps.items())),
        ("verified by the guest", ", ".join(f"{name} {count:,}" for name, count in outcome.verified.items())),
        ("commands that succeeded", ", ".join(f"{name} {count:,}" for name, count in outcome.commands.items())),
    ):
        totals.add_row(name, text)
    console.print(totals)
    for text in outcome.guest_worst:
        console.print(f"longest pauses: {text}", markup=False, highlight=False)
    for error, count in sorted(outcome.errors.items(), key=lambda entry: -entry[1]):
        console.print(f"{count:6,} commands failed: {error}", markup=False, highlight=False)
    for problem in outcome.problems:
        console.print(f"WRONG: {problem}", markup=False, highlight=False)
    console.print("every byte was right" if outcome.ok else "FAILED")
