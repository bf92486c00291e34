"""From whom memory is taken under pressure: the idle before the busy, by shares.

Min-funding revocation with an idle tax (C. A. Waldspurger, "Memory Resource Management in VMware ESX Server", OSDI
2002, section 5): a VM with S shares that holds P pages, of which the part f is in use, pays a price of
S / (P * (f + k * (1 - f))) a page, k = 1 / (1 - tax). Memory is taken from the one that pays least, piece by piece, so
that several VMs alike give alike, and a VM that gave pays more for what it keeps.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

#: ESX's default: an idle page costs four times a used one. Not 1, which would take all idle memory of one VM however
#: many shares it has; a VM that wakes up has something left.
TAX = 0.75
_IDLE_COST = 1 / (1 - TAX)
#: Pieces that what is needed is taken in, where there is time, and the smallest one: a MiB, for less is not worth an
#: epoch.
PIECES, _PIECE_LEAST = 32, 256


@dataclass(frozen=True, slots=True)
class Holder:
    """A VM that can give. Pages.

    :ivar held: backing and store.
    :ivar used: of those, the working set.
    :ivar spare: that may be taken at most.
    """

    name: str
    shares: int
    held: int
    used: int
    spare: int


def price(shares: int, held: float, used: float) -> float:
    """What a VM pays a page."""
    if held <= 0:
        return float("inf")
    part = min(1.0, max(0.0, used / held))
    return shares / (held * (part + _IDLE_COST * (1 - part)))


def taken(holders: Sequence[Holder], need: int, pieces: int = PIECES) -> dict[str, int]:
    """Pages to take from each, by name; those that give nothing are left out. No more than ``need`` in all.

    Idle pages go first of each, so what a holder has left is ever more in use, and dearer.
    """
    given: dict[str, int] = {}
    # The place settles ties, so that the outcome does not depend on names.
    heap = [(price(each.shares, each.held, each.used), place, each, each.held) for place, each in enumerate(holders)]
    heapq.heapify(heap)
    piece = max(_PIECE_LEAST, -(-need // pieces))
    while need > 0 and heap:
        _, place, holder, held = heap[0]
        pages = min(piece, need, holder.spare - given.get(holder.name, 0))
        if pages <= 0:
            heapq.heappop(heap)
            continue
        given[holder.name] = given.get(holder.name, 0) + pages
        need -= pages
        held -= pages
        heapq.heapreplace(heap, (price(holder.shares, held, holder.used), place, holder, held))
    return given
