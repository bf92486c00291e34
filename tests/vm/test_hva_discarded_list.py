"""The guest sees what the host has taken; what it frees of that is not loaded again (part 7 of the 2006 patches)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import numpy as np
import pytest
import pytest_asyncio
from numpy.typing import NDArray

from hva_host.agent import discarded_list
from hvaqemu.pages import PAGE_SIZE, STATE_MASK, PageState, Residence
from hvaqemu.units import MiB
from tests.vm.betrayal import Dependants
from tests.vm.harness import BOTH, STEP_SECONDS, UNUSED, Guest, running_guest, until

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(900)]

_MEMORY = 512 * MiB
_PAGES = _MEMORY // PAGE_SIZE
_LIST = "/run/hva/discarded"
#: 256 MiB of the root disk, through the page cache.
_FILL = "dd if=/dev/vda of=/dev/null bs=64k count=4096 2>/dev/null"
_KINDS = {kind.name.lower(): kind for kind in Residence}
#: Pages that what little the guest does meanwhile may use and free between an epoch and a look at what it did.
_MEANWHILE = 256


class Listed:
    """What the guest's list says.

    :ivar kinds: a residence a page; shape ``(pages,)``.
    """

    def __init__(self, text: str) -> None:
        head, _, body = text.partition("\n\n")
        self.facts = dict(line.split(" ") for line in head.splitlines())
        self.kinds = np.zeros(_PAGES, dtype=np.uint8)
        for line in body.splitlines():
            run, kind = line.split(" ")
            first, last = map(int, run.split("-"))
            assert first <= last and not self.kinds[first : last + 1].any()
            self.kinds[first : last + 1] = _KINDS[kind]

    def total(self, kind: Residence) -> int:
        return int(self.facts[kind.name.lower()])


def ledger(guest: Guest) -> NDArray[np.uint8]:
    return Dependants(guest.qemu_pid, _MEMORY).kinds


async def told(guest: Guest) -> Listed:
    """The list, once it agrees with the ledger but for what the guest does meanwhile (reading the list, for one)."""
    deadline = time.monotonic() + 60
    while True:
        text = await guest.run(f"cat {_LIST} 2>/dev/null || true")
        if text and np.count_nonzero((listed := Listed(text)).kinds != ledger(guest)) < 0.03 * _PAGES:
            return listed
        assert time.monotonic() < deadline, f"no list that agrees: {text[:300]!r}"
        await asyncio.sleep(0.5)


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def guest() -> AsyncIterator[Guest]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(discarded_list, "EVERY_SECONDS", 0.5)
        patch.setattr(discarded_list, "_LOOK_SECONDS", 2.0)
        async with running_guest("listed", memory=_MEMORY) as found:
            yield found


async def test_the_list_is_what_the_ledger_says(guest: Guest) -> None:
    text = await guest.run(f"cat {_LIST} 2>/dev/null || true")
    assert not text or not Listed(text).kinds.any(), "nothing was taken"
    await guest.run(_FILL)
    await guest.vm.reclaim(BOTH)
    listed = await told(guest)
    taken = np.count_nonzero(listed.kinds)
    assert taken > 0.5 * _PAGES
    assert listed.facts["complete"] == "yes"
    assert int(listed.facts["pages"]) == _PAGES
    for kind in (Residence.ZERO, Residence.LAYER, Residence.PRESERVED):
        assert np.count_nonzero(listed.kinds == kind) == listed.total(kind)
    assert int(listed.facts["discarded-ever"]) >= taken
    assert (await guest.run(f"stat -c %a {_LIST}")).strip() == "644"
    assert await guest.run(f"su nobody -s /bin/sh -c 'head -n 1 {_LIST}'") == "version 1\n"

    # Made resident by the guest: the list follows, without an epoch.
    await guest.run(_FILL)
    again = await told(guest)
    assert again.total(Residence.LAYER) < 0.3 * listed.total(Residence.LAYER)
    assert int(again.facts["refaulted-ever"]) > 0.5 * listed.total(Residence.LAYER)


async def test_what_the_guest_frees_becomes_zero(guest: Guest) -> None:
    tree = await guest.tree_digest()
    await guest.run(_FILL)
    await guest.vm.reclaim(BOTH)
    before = ledger(guest)
    assert np.count_nonzero(before == Residence.LAYER) > 0.2 * _PAGES
    await guest.run("echo 3 >/proc/sys/vm/drop_caches")
    measured = await guest.vm.measure()
    stats = await guest.epoch(UNUSED)
    after = ledger(guest)
    turned = (before == Residence.LAYER) & (after == Residence.ZERO)
    free = guest.classes() & STATE_MASK == PageState.UNUSED
    # Those that were used again in between came back, and may have been discarded anew.
    assert stats.freed > 0.15 * _PAGES
    assert stats.freed <= np.count_nonzero(turned) + _MEANWHILE
    assert np.count_nonzero(turned & ~free) < _MEANWHILE / 4
    # All there are: what is still in use stays what it was, to the page.
    assert np.count_nonzero((after == Residence.LAYER) & free) < 0.01 * _PAGES
    assert (await guest.vm.measure()).freed_pages - measured.freed_pages == stats.freed

    # They are used again, for other things: nothing is loaded from the image for it.
    loaded = (await guest.vm.measure()).layer_pages_loaded
    digest = await guest.run("dd if=/dev/urandom of=/dev/shm/new bs=64k count=1600 2>/dev/null; md5sum /dev/shm/new")
    used = (await guest.vm.measure()).layer_pages_loaded - loaded
    assert used < 0.2 * 1600 * 16, f"{used} pages loaded"
    assert await guest.run("md5sum /dev/shm/new; rm /dev/shm/new") == digest
    assert await guest.tree_digest() == tree
    assert await guest.complaints() == []


async def whole_epoch(guest: Guest) -> None:
    """Wait until an epoch has ended that began after this."""
    seen = guest.heard("EPOCH")
    await until(lambda: guest.heard("EPOCH") > seen + 1, STEP_SECONDS, "an epoch")


async def test_it_goes_on_while_pages_are_freed_and_used_again(guest: Guest) -> None:
    """Continuous epochs beside a guest that drops its cache, fills memory and reads its files back."""
    tree = await guest.tree_digest()
    guest.vm.start_reclaiming(BOTH, 0.0)
    digests = []
    for _ in range(2):
        digests.append(await guest.tree_digest())
        await whole_epoch(guest)
        await guest.run(
            "dd if=/dev/urandom of=/dev/shm/new bs=64k count=400 2>/dev/null; md5sum /dev/shm/new >/run/sum; "
            "echo 3 >/proc/sys/vm/drop_caches"
        )
        await whole_epoch(guest)
        await guest.run("md5sum -c /run/sum; rm /dev/shm/new")
    result = await guest.vm.stop_reclaiming()
    assert sum(stats.freed for stats in result.epochs) > 500
    assert digests == [tree] * 2
    assert await guest.tree_digest() == tree
    assert await guest.complaints() == []
