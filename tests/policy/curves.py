"""What a curve over time did."""

from __future__ import annotations

from collections.abc import Sequence


def turns(sizes: Sequence[int], least: int) -> int:
    """How often a curve turned round by more than ``least``."""
    found, extreme, rising = 0, sizes[0], False
    for size in sizes:
        if (size > extreme) is rising and size != extreme:
            extreme = size
        elif abs(size - extreme) > least:
            found, extreme, rising = found + 1, size, not rising
    return found
