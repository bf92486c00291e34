"""PRESERVED on a real guest: what has no copy is paged out, compressed, under a guest that verifies its memory."""

from __future__ import annotations

import pytest

from hva_host.agent.pager_process import call
from hvaqemu.reclaim_config import ReclaimState
from hvaqemu.units import MiB
from tests.vm.harness import Guest, running_guest, until

pytestmark = pytest.mark.timeout(1800)

_SECONDS = 10
#: How often the guest churns for so long at most.
_ROUNDS = 6
_ALL = tuple(ReclaimState)
_MEMORY = 256 * MiB
#: What a program of the guest keeps and does not use; each page another, a quarter of each is noise.
_KEPT = 24 * MiB
#: Less than there is to page out, and more than the program's memory takes.
_LIMIT = 12 * MiB


def enough(guest: Guest, told: int) -> bool:
    """Whether, of its events after the first ``told``, some are of epochs, and those paged pages out."""
    epochs = [data["stats"] for name, data in guest.events[told:] if name == "EPOCH"]
    return len(epochs) > 5 and sum(stats["discarded_store"] for stats in epochs) > 1000


async def test_paged_out_and_back_under_a_guest_that_verifies_itself() -> None:
    async with running_guest("preserved", memory=_MEMORY, store={"limit": _LIMIT}) as guest:
        await guest.program("churn", "remember")
        await guest.program("keeper", "keep", _KEPT)
        tree = await guest.tree_digest()
        filled = await guest.vm.measure()

        plain = await guest.vm.reclaim((ReclaimState.UNUSED, ReclaimState.VOLATILE))
        assert plain.store_after_bytes == 0
        result = await guest.vm.reclaim(_ALL)
        out = await guest.vm.measure()
        print(
            f"filled {filled.backing_bytes / MiB:.1f}, without the store {plain.backing_after_bytes / MiB:.1f}, with "
            f"{out.backing_bytes / MiB:.1f} + {out.store_bytes / MiB:.1f} MiB, {out.preserved_pages} pages, "
            f"{len(result.epochs)} epochs, {result.seconds:.1f} s"
        )
        # A full store stops paging out, and nothing else.
        assert {stats.note for stats in result.epochs} == {"", "the store has reached its limit"}
        assert _LIMIT / 2 < out.store_bytes <= _LIMIT
        # A sample first, then more.
        first, second = (stats.discarded_store for stats in result.epochs[:2])
        assert 0 < first < second
        assert out.preserved_pages * 4096 > _KEPT, "a program that sleeps has cold memory"
        assert out.store_bytes < out.preserved_pages * 4096 / 2
        assert out.backing_bytes + out.store_bytes < 0.85 * plain.backing_after_bytes

        told, rounds = len(guest.events), 0
        guest.vm.start_reclaiming(_ALL, 0.0)
        while rounds < _ROUNDS and not enough(guest, told):
            rounds += 1
            churned = await guest.program("churn", _SECONDS, timeout=_SECONDS + 240, check=False)
            assert churned.ok, churned.stderr.decode(errors="replace")
        await guest.vm.stop_reclaiming()
        assert enough(guest, told)
        await guest.program("keeper", "check")
        assert await guest.tree_digest() == tree
        assert await guest.complaints() == []

        # A pager that dies takes nothing with it.
        await guest.vm.reclaim(_ALL)
        before = await call(guest.vm.pager, "status")
        assert before["preserved_pages"] > 1000
        guest.vm.pager.kill()
        await until(lambda: guest.heard("PAGER_STARTED"), 60, "another pager")
        assert await guest.tree_digest() == tree

        await guest.vm.restore()
        back = await guest.vm.measure()
        assert (back.preserved_pages, back.store_bytes) == (0, 0)
        status = await guest.vm.status()
        print(f"vCPUs waited: {status.stalls}")
        assert await guest.complaints() == []
