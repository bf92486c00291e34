"""What policy says: what to do now, what to tell people, and when to look again.

The driver carries out what it can and forgets the rest: nothing is owed. What was done is seen in the next look, so a
step that was refused, failed or timed out needs no answer. It runs the steps of different VMs side by side or in the
order given, and never two of one VM at once.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from hvaqemu.reclaim_config import ReclaimState


class Purpose(enum.StrEnum):
    """Why something is done."""

    PROACTIVE = "proactive"
    TARGET = "target"
    PRESSURE = "pressure"
    #: The host has hardly anything left: what guests use is taken too.
    EMERGENCY = "emergency"


@dataclass(frozen=True, slots=True)
class Scan:
    """Ask the guest for a report: nothing is discarded. Costs one scan (an epoch with UNUSED pages costs three)."""

    vm: str
    reason: str


@dataclass(frozen=True, slots=True)
class Step:
    """Run one epoch.

    :ivar states: to try, most dispensable first.
    :ivar pages: at most so many, and what else the last region holds; at least 1.
    :ivar sampled: pages with content go through coldness sampling, and free ones must have been free for a while;
        else every page of ``states`` goes, whatever it was used for.
    """

    vm: str
    states: tuple[ReclaimState, ...]
    pages: int
    sampled: bool
    purpose: Purpose
    reason: str


@dataclass(frozen=True, slots=True)
class Balloon:
    """Set the guest's balloon so that it keeps ``guest_bytes``; all of its memory: deflate it.

    :ivar taken_bytes: what policy has taken by it then, in all; to be remembered with the VM.
    """

    vm: str
    guest_bytes: int
    taken_bytes: int
    purpose: Purpose
    reason: str


class Complaint(enum.StrEnum):
    """What an operator has to know. The values are fit for names of events."""

    #: The host is short and nothing is left to take.
    NOTHING_LEFT = "nothing-left"
    #: A guest in mode target can not be brought down to it.
    TARGET_MISSED = "target-missed"
    #: A guest is taken from although it is short itself.
    GUEST_SHORT = "guest-short"


@dataclass(frozen=True, slots=True)
class Warn:
    """Tell people, loudly; each at most every ``REPEAT_SECONDS``.

    :ivar vm: "" where it is about the host.
    :ivar missing_bytes: what there is too little of.
    """

    complaint: Complaint
    vm: str
    missing_bytes: int
    reason: str


#: How often a warning that goes on holding is repeated: often enough to be seen, seldom enough to be read.
REPEAT_SECONDS = 60.0


class Phase(enum.StrEnum):
    """What policy does with a VM at present."""

    #: Mode off or manual, or mode pressure without any.
    IDLE = "idle"
    #: Too little is known yet: no report, no rates, or the last look is too old.
    BLIND = "blind"
    #: Steps grow.
    GROWING = "growing"
    #: Steps go on as they are: the refault rate is near its budget.
    HOLDING = "holding"
    #: Beyond the budget: nothing is discarded until ``next_s``.
    COOLING = "cooling"
    #: There is little to gain (or the target is reached): looked at seldom.
    RESTING = "resting"
    #: The guest is short of memory itself, and left alone.
    GUEST_SHORT = "guest-short"
    #: The host is short, and the VM is taken from for that.
    PRESSED = "pressed"


@dataclass(frozen=True, slots=True)
class View:
    """What policy thinks of a VM, for people and metrics. Pages, and pages a minute.

    :ivar working_set: None: not known yet.
    :ivar refault_rate: over the sliding window; None: not known yet.
    :ivar budget: that the rate is held to.
    :ivar step: pages of the next step.
    :ivar next_s: when something may be done next, of the looks' clock.
    """

    vm: str
    phase: Phase
    working_set: int | None
    refault_rate: float | None
    budget: float | None
    step: int
    next_s: float
    reason: str


@dataclass(frozen=True, slots=True)
class Decisions:
    """Everything that was decided on one look.

    :ivar look_again_s: seconds until the next look is worth its cost; a PSI trigger may bring it forward.
    """

    scans: tuple[Scan, ...] = ()
    steps: tuple[Step, ...] = ()
    balloons: tuple[Balloon, ...] = ()
    warnings: tuple[Warn, ...] = ()
    views: tuple[View, ...] = ()
    look_again_s: float = 1.0
