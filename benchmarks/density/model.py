"""What guests the experiment has, and what it finds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Self

from benchmarks.density.group import Usage
from hvaqemu.units import MiB

#: Of each guest, bytes.
MEMORY = 512 * MiB
#: Where the first guest's service is reached; the others follow.
FIRST_PORT = 18080


@dataclass
class Fit:
    """So many guests, all serving; ``cpu`` in cores, of all their processes."""

    guests: int
    share: float
    worst: float
    cpu: float
    usage: Usage
    measures: list[dict[str, Any]]


@dataclass
class Found:
    """What one method came to; ``ended`` says why there are no more guests."""

    method: str
    fits: list[Fit] = field(default_factory=list)
    ended: str = ""

    @classmethod
    def of(cls, kept: dict[str, Any]) -> Self:
        """As it was kept, by ``dataclasses.asdict``."""
        fits = [Fit(**fit | {"usage": Usage(**fit["usage"])}) for fit in kept["fits"]]
        return cls(kept["method"], fits, kept["ended"])

    @property
    def guests(self) -> int:
        """That fit."""
        return self.fits[-1].guests if self.fits else 0
