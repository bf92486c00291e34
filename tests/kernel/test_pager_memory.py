"""Eight pagers of 1 GiB guests, after work: small each, and nothing left of them."""

from __future__ import annotations

from benchmarks.pager_memory import PAGERS, costs
from hvaqemu.units import MiB


async def test_eight_pagers_are_small() -> None:
    found = await costs()
    assert len(found) == PAGERS
    assert max(private + ledger for private, ledger in found) <= 12 * MiB
    # The ledger of 1 GiB has 8 bytes a page; not counted twice, nor forgotten.
    assert all(2 * MiB <= ledger <= 3 * MiB for _, ledger in found)
