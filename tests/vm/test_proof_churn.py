"""Continuous epochs under a guest that uses its memory as hard as it can, with and without the guest's confirmation."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

from hva_host.agent.epochs import EpochDriver
from hva_host.agent.guest_link import GuestLink
from hva_host.agent.model import ReclaimResult
from hva_host.agent.pager_link import PagerLink
from hva_host.pager.epoch import CONFIRM_ROUNDS
from hvaqemu.errors import HvaError
from hvaqemu.pages import Run
from hvaqemu.units import MiB
from tests.vm.harness import BOTH, Guest, running_guest, until

pytestmark = pytest.mark.timeout(900)

#: The churn goes on for so long, and until so many epochs have discarded pages of both kinds, but not for ever.
_SECONDS, _EPOCHS, _SECONDS_MAX = 32, 10, 240
#: Small enough that what the workload frees is used again within moments.
_MEMORY = 256 * MiB


async def churn(guest: Guest, seconds: float, patience: float) -> tuple[list[str], str]:
    """What went wrong in a guest that churned, and what it printed."""
    work = asyncio.create_task(guest.program("churn", seconds, timeout=patience, check=False))
    waited: set[asyncio.Future[Any]] = {work, guest.vm.failure}
    await asyncio.wait(waited, timeout=patience, return_when=asyncio.FIRST_COMPLETED)
    if guest.vm.failure.done():
        work.cancel()
        await asyncio.wait({work})
        return [f"VM: {guest.vm.failure.result()}"], ""
    if not work.done():
        work.cancel()
        await asyncio.wait({work})
        return ["the workload did not end"], ""
    if (error := work.exception()) is not None:
        return [f"guest agent: {error}"], ""
    done = work.result()
    return ([] if done.ok else [done.stderr.decode(errors="replace") or str(done)]), done.stdout.decode()


async def reclaimed(guest: Guest) -> tuple[list[str], ReclaimResult | None]:
    """What ended the reclaiming before it was stopped, and what it did."""
    try:
        return [], await guest.vm.stop_reclaiming()
    except HvaError as error:
        return [f"reclaim: {error}"], None


def fruitful(guest: Guest) -> int:
    """Epochs so far that have discarded pages of both kinds."""
    told = [data["stats"] for name, data in guest.events if name == "EPOCH"]
    return sum(stats["discarded_zero"] > 0 and stats["discarded_layer"] > 0 for stats in told)


async def end_in_time(guest: Guest) -> None:
    """End the churn before it ends by itself, once there is enough to be seen."""
    await asyncio.sleep(_SECONDS)
    await until(lambda: fruitful(guest) >= _EPOCHS, _SECONDS_MAX, f"{_EPOCHS} epochs that discard pages of both kinds")
    await guest.run("touch /run/churn.end")


async def test_churn_under_continuous_epochs() -> None:
    # No epoch is cut short where the guest only has to wait for a processor.
    async with running_guest("churn", memory=_MEMORY, protection_limit=60.0) as guest:
        await guest.program("churn", "remember")
        tree = await guest.tree_digest()
        before = await guest.vm.measure()
        guest.vm.start_reclaiming(BOTH, 0.0)
        ending = asyncio.create_task(end_in_time(guest))
        problems, said = await churn(guest, _SECONDS_MAX, _SECONDS_MAX + 240)
        ending.cancel()
        await asyncio.gather(ending, return_exceptions=True)
        assert not problems
        problems, result = await reclaimed(guest)
        assert not problems and result is not None
        after = await guest.vm.measure()

        assert await guest.complaints() == []
        assert await guest.tree_digest() == tree
        print(f"{len(result.epochs)} epochs, {result.discarded} pages discarded, {said.split()}")

        assert result.seconds >= 30
        assert fruitful(guest) >= _EPOCHS
        assert not [stats.note for stats in result.epochs if stats.note]
        assert sum(stats.discarded_zero for stats in result.epochs) > 10_000
        assert sum(stats.discarded_layer for stats in result.epochs) > 10_000
        # The guest did use pages between protection and discard, and did come back for discarded ones.
        assert sum(stats.touched for stats in result.epochs) > 100
        assert after.refault_pages - before.refault_pages > 10_000


async def test_churn_is_a_test_without_the_confirmation_it_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    async def believe(
        _driver: EpochDriver, _guest: GuestLink, pager: PagerLink, epoch: bytes, part: Run, _seconds: float
    ) -> None:
        everything = np.packbits(np.ones(part.pages, dtype=np.bool_)).tobytes()
        for number in range(1, CONFIRM_ROUNDS + 1):
            await pager.call("confirm", {"epoch": epoch.hex(), "round": number}, everything)

    async with running_guest("unsafe", memory=_MEMORY) as guest:
        await guest.program("churn", "remember")
        monkeypatch.setattr(EpochDriver, "_confirm", believe)
        guest.vm.start_reclaiming(BOTH, 0.0)
        problems, _ = await churn(guest, 40, 60)
        more, _ = await reclaimed(guest)
        problems += more
        if not problems:
            problems = await guest.complaints()
        print(problems)
        assert problems
