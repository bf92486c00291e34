"""What the ways of reclaiming say of one VM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

from hva_host.policy.decisions import Phase, Scan, Step, Warn

S = TypeVar("S")


@dataclass(frozen=True, slots=True)
class Verdict(Generic[S]):
    """What to remember, what to do, and what to tell.

    :ivar next_s: when something may be done next.
    """

    state: S
    phase: Phase
    reason: str
    next_s: float
    step: Step | None = None
    scan: Scan | None = None
    warn: Warn | None = None
