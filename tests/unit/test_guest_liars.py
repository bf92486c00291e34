"""What lying guests cost: each, in a process of its own, speaks to a real link that serves an honest guest beside it.

Figures with more time behind them: ``python -m benchmarks liars``. Bounds here are for machines that do other things
too; without the budget of reading, a flood takes the whole core and fails them all.
"""

from __future__ import annotations

import pytest

from tests.liars.guest import WAYS
from tests.liars.measure import measure

MiB = 1 << 20


@pytest.mark.parametrize("way", [way for way in WAYS if way != "honest"])
def test_a_liar_costs_little_and_its_neighbour_nothing(way: str) -> None:
    cost = measure(way, 0.75, settle=0.75)
    assert cost.cpu_share < 0.3, cost
    assert cost.growth < 8 * MiB, cost
    assert cost.median < 0.05 and cost.p99 < 0.5, cost
    assert cost.scans > 0, cost
    # A burst, then one a second; each is a line in the log.
    assert cost.events <= 16 + 4, cost
    assert cost.logged < 8192, cost
