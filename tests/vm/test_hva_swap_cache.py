"""Clean swap-cache pages are copies of the swap disk's frozen file: they are discarded, and come back right."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import numpy as np
import pytest
import pytest_asyncio

from hva_host.agent import chain_keeper
from hvaqemu.config import FREEZE_AFTER_MIN, FreezeConfig
from hvaqemu.pages import PAGE_SIZE, STATE_MASK, PageAttribute, PageState
from hvaqemu.units import GiB, MiB
from tests.vm.harness import BOTH, STEP_SECONDS, VOLATILE, Guest, running_guest, until

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(1800)]

_MEMORY = 128 * MiB
_SWAP = 512 * MiB
#: More than the guest has; less than makes it kill anybody.
_HELD_MIB = 90
_STORM_MIB = 100
_SECONDS = 8
#: How many storms of that length there are at most.
_STORMS = 6
_READY, _GO = "/run/swapper.ready", "/run/swapper.go"


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def guest() -> AsyncIterator[Guest]:
    async with running_guest("swapping", memory=_MEMORY, swap=_SWAP) as found:
        yield found


async def swap_layer_pages(guest: Guest) -> int:
    """Pages that depend on frozen files of the swap disk."""
    answer = await guest.vm.pager.link.call("layers")
    return sum(layer["pages"] for layer in answer["layers"] if "/swap" in layer["path"])


async def test_the_guest_swaps_to_the_disk_of_its_config(guest: Guest) -> None:
    lines = (await guest.run("cat /proc/swaps")).splitlines()[1:]
    assert len(lines) == 1
    kib = int(lines[0].split()[2])
    assert 0 <= _SWAP - (kib << 10) <= 2 * PAGE_SIZE
    # By its name, however the guest calls its disks.
    disk = lines[0].split()[0].rpartition("/")[2]
    assert await guest.run(f"cat /sys/block/{disk}/serial") == "swap"


async def test_swap_cache_is_discarded_against_the_frozen_swap_layer(guest: Guest) -> None:
    held = asyncio.create_task(guest.program("swapper", "hold", _HELD_MIB, _READY, _GO, timeout=300))
    async with asyncio.timeout(240):
        while (await guest.run(f"test -e {_READY} && echo there || :")) == "":
            assert not held.done(), held.result()
            await asyncio.sleep(0.2)
    # What there is to gain without the swap disk, taken first.
    await guest.vm.reclaim(BOTH)
    classes = guest.classes()
    wanted = PageState.VOLATILE, int(PageAttribute.SWAPCACHE)
    reported = int(np.count_nonzero((classes & STATE_MASK == wanted[0]) & (classes & wanted[1] != 0)))
    without = (await guest.vm.measure()).backing_bytes
    await guest.vm.freeze("swap")
    stats = (await guest.vm.reclaim([VOLATILE], epochs=1)).epochs[0]
    gained = without - (await guest.vm.measure()).backing_bytes
    print(
        f"{reported} swap-cache pages reported clean, {stats.discarded_swap_cache} discarded, "
        f"{gained / MiB:.1f} MiB gained; {await swap_layer_pages(guest)} depend on the swap layer"
    )
    assert stats.discarded_swap_cache > 2000
    assert await swap_layer_pages(guest) > 2000
    assert gained > 2000 * PAGE_SIZE
    await guest.run(f"touch {_GO}")
    assert b"pages are right" in (await held).stdout


async def test_a_swap_storm_beside_freezes_merges_and_reclaims_loses_nothing(
    guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Frozen and merged by itself, as fast as the guest swaps."""
    often = FreezeConfig(after=FREEZE_AFTER_MIN, every=0.5, depth=2, disk_budget=16 * GiB)
    monkeypatch.setattr(guest.vm.disks, "_config", often)
    monkeypatch.setattr(chain_keeper, "_LOOK_SECONDS", 0.2)
    before = guest.heard("FROZEN")
    frozen = merged = swapped = storms = 0
    while storms < _STORMS and (frozen < 3 or not merged or swapped <= 500):
        storms += 1
        storm = asyncio.create_task(guest.program("swapper", "storm", _STORM_MIB, _SECONDS, timeout=400))
        while not storm.done():
            swapped += (await guest.epoch(*BOTH)).discarded_swap_cache
        said = (await storm).stdout.decode()
        frozen, merged = guest.heard("FROZEN") - before, guest.heard("MERGE_ENDED")
        print(f"{frozen} freezes, {merged} merges, {swapped} swap-cache pages discarded, {said.split()}")
    assert frozen >= 3
    assert merged >= 1
    assert swapped > 500
    assert guest.heard("FREEZE_FAILED") == 0
    assert await guest.complaints() == []
    # A budget that is used up is told of, once, and nothing is frozen any more.
    monkeypatch.setattr(guest.vm.disks, "_config", often.model_copy(update={"disk_budget": 0}))
    await guest.run("head -c 20M /dev/urandom >/var/tmp/written; sync")
    await until(lambda: guest.heard("FREEZE_BUDGET"), STEP_SECONDS, "the budget to be told of")
    frozen = guest.heard("FROZEN")
    await asyncio.sleep(1.0)
    assert (guest.heard("FREEZE_BUDGET"), guest.heard("FROZEN")) == (1, frozen)
    # Nothing holds on to what nobody depends on any more.
    await guest.vm.restore()
    await until(lambda: not guest.vm.record.retired, 60, f"merged files {guest.vm.record.retired}")
