"""What the guest says of its pages, and what becomes of them: locked and dirty ones stay, clean copies come back."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
from numpy.typing import NDArray

from hvaqemu.pages import STATE_MASK, PageState, Run
from tests.vm.harness import BOTH, UNUSED, VOLATILE, Guest, running_guest

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(900)]

_PAGES = 64
#: Bits of /proc/kpageflags (include/uapi/linux/kernel-page-flags.h and include/linux/kernel-page-flags.h).
_DIRTY, _ANON, _MLOCKED = 4, 12, 33


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def guest() -> AsyncIterator[Guest]:
    # One slice, which waits for what the guest does while its pages are protected.
    async with running_guest("states", protection_limit=120.0) as found:
        yield found


@pytest_asyncio.fixture(loop_scope="module")
async def held(guest: Guest) -> AsyncIterator[Guest]:
    """The guest with pages of each kind in it."""
    await guest.program("hold")
    yield guest
    await guest.run("touch /run/hold/end; while [ -e /run/hold ]; do sleep 0.05; done")


class Held:
    """What the guest knows of the held pages, by kind."""

    def __init__(self, said: dict[str, dict[str, Any]]) -> None:
        self.pfns = {kind: np.array(held["pfns"], dtype=np.int64) for kind, held in said.items()}
        self.sums = {kind: str(held["sum"]) for kind, held in said.items()}
        self._flags = {kind: np.array(held["flags"], dtype=np.uint64) for kind, held in said.items()}

    def all_flagged(self, kind: str, bit: int) -> bool:
        return bool((self._flags[kind] >> np.uint64(bit) & np.uint64(1)).all())

    def none_flagged(self, kind: str, bit: int) -> bool:
        return not (self._flags[kind] >> np.uint64(bit) & np.uint64(1)).any()


async def ask(guest: Guest) -> Held:
    said = await guest.run(
        "cd /run/hold; rm -f said; touch ask; until [ -e said ]; do sleep 0.05; done; cat said", timeout=60
    )
    return Held(json.loads(said))


def states(guest: Guest, pfns: NDArray[np.int64]) -> set[PageState]:
    return {PageState(value) for value in guest.classes()[pfns] & STATE_MASK}


async def test_locked_and_dirty_pages_stay_and_clean_copies_come_back(held: Guest) -> None:
    guest = held
    pages = await ask(guest)
    # First that the pages are what they should be, by the guest kernel's own word.
    assert all((pfns >= 0).all() and len(set(pfns)) == _PAGES for pfns in pages.pfns.values())
    assert pages.all_flagged("locked", _MLOCKED) and pages.none_flagged("locked", _ANON)
    assert pages.all_flagged("anonymous", _MLOCKED) and pages.all_flagged("anonymous", _ANON)
    assert pages.all_flagged("dirty", _DIRTY) and pages.none_flagged("dirty", _ANON)
    assert pages.none_flagged("synced", _DIRTY) and pages.none_flagged("clean", _DIRTY)
    assert guest.presence()[np.concatenate(list(pages.pfns.values()))].all()

    stats = [await guest.epoch(*BOTH) for _ in range(3)]
    present = guest.presence()

    # Nobody has touched them in between, so they are where they were.
    for kind in ("locked", "dirty", "anonymous"):
        assert states(guest, pages.pfns[kind]) == {PageState.STABLE}, kind
        assert present[pages.pfns[kind]].all(), kind
    assert states(guest, pages.pfns["synced"]) == {PageState.VOLATILE}
    assert present[pages.pfns["synced"]].all()
    assert states(guest, pages.pfns["clean"]) == {PageState.VOLATILE}
    assert not present[pages.pfns["clean"]].any()
    assert sum(epoch.unmatched for epoch in stats) >= _PAGES
    assert sum(epoch.discarded_layer for epoch in stats) >= _PAGES

    before = await guest.vm.measure()
    again = await ask(guest)
    assert again.sums == pages.sums
    for kind, pfns in again.pfns.items():
        assert (pfns == pages.pfns[kind]).all(), kind
    assert guest.presence()[pages.pfns["clean"]].all()
    after = await guest.vm.measure()
    assert after.refaults > before.refaults
    assert after.refault_pages - before.refault_pages >= _PAGES
    assert await guest.complaints() == []


async def test_pages_used_after_protection_are_kept(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The guest fills free pages after they were protected, before and between the two confirming scans."""
    confirm, pager_call = guest.vm.guest.confirm, guest.vm.pager.link.call
    fill = "dd if=/dev/urandom of=/dev/shm/{0} bs=64k count=64 2>/dev/null; md5sum /dev/shm/{0}"
    sums: dict[str, str] = {}

    async def fill_first(epoch: bytes, number: int, part: Run, timeout: float) -> Any:
        sums[f"before-{number}"] = await guest.run(fill.format(f"before-{number}"))
        return await confirm(epoch, number, part, timeout)

    async def fill_between(command: str, arguments: Any = None, *rest: Any, **named: Any) -> Any:
        if command == "confirm":
            # The scan is done and says free; what it says has not reached the pager.
            name = f"after-{arguments['round']}"
            sums[name] = await guest.run(fill.format(name))
        return await pager_call(command, arguments, *rest, **named)

    monkeypatch.setattr(guest.vm.guest, "confirm", fill_first)
    monkeypatch.setattr(guest.vm.pager.link, "call", fill_between)
    await guest.run("dd if=/dev/zero of=/dev/shm/used bs=1M count=200 2>/dev/null; rm /dev/shm/used")
    stats = await guest.epoch(UNUSED)
    assert sorted(sums) == ["after-1", "after-2", "before-1", "before-2"]
    # 4 MiB at each of four moments; some of it lands on pages that were free of the host's memory already.
    assert stats.touched > 1024
    assert stats.discarded_zero > 10_000
    for name, digest in sums.items():
        assert await guest.run(f"md5sum /dev/shm/{name}; rm /dev/shm/{name}") == digest
    assert await guest.complaints() == []


async def test_an_old_report_costs_time_and_nothing_else(guest: Guest) -> None:
    """Copies are compared byte for byte, so what changed since the report stays."""
    await guest.run("cp /usr/bin/perl /var/tmp/changed; sync; md5sum /var/tmp/changed")
    stats = await guest.epoch(VOLATILE)
    assert not stats.note
    script = """
import hashlib
with open("/var/tmp/changed", "r+b") as file:
    data = bytearray(file.read())
    for at in range(0, len(data), 4096):
        data[at] ^= 0xFF
    file.seek(0)
    file.write(data)
print(hashlib.md5(data).hexdigest())
"""
    right = (await guest.python(script)).stdout.decode().strip()

    async def nothing_new(_guest: Any) -> None:
        return

    driver = guest.vm.reclaimer._driver
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "scan", nothing_new)
        stats = await guest.epoch(VOLATILE)
    assert stats.unmatched > 0
    assert (await guest.run("md5sum /var/tmp/changed")).split()[0] == right
    await guest.run("rm /var/tmp/changed")
    assert await guest.complaints() == []
