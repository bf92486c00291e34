"""POTENTIAL: clean pages of a file that a process has mapped shared and writable (part 5 of the 2006 patches)."""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import struct
from collections.abc import AsyncIterator, Callable
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
from numpy.typing import NDArray

from hva_host.agent import epochs
from hva_host.agent.epochs import EpochDriver
from hva_host.agent.guest_link import GuestLink
from hva_host.agent.members import members
from hva_host.agent.model import EpochStats
from hva_host.agent.pager_link import PagerLink
from hva_host.pager.epoch import CONFIRM_ROUNDS
from hva_host.pager.membership import Member
from hvaqemu.image_config import ImageConfig
from hvaqemu.pages import PAGE_SIZE, STATE_MASK, PageState, Run
from hvaqemu.reclaim_config import ReclaimState
from hvaqemu.units import MiB
from tests.vm.betrayal import Dependants
from tests.vm.harness import BOTH, STEP_SECONDS, VOLATILE, Guest, running_guest, until

#: The image may have to be built first.
pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(900)]

POTENTIAL = ReclaimState.POTENTIAL
_MEMORY = 512 * MiB
_FILE, _SIZE = "/opt/mapped", 64 * MiB
_PAGES = _SIZE // PAGE_SIZE
_WRITING_SECONDS = 6.0


class Mapped:
    """The process in the guest, and what its file must hold."""

    def __init__(self, guest: Guest, content: bytes, patch: pytest.MonkeyPatch) -> None:
        self.guest = guest
        driver = guest.vm.reclaimer._driver
        self._scan = driver.scan
        #: Where the mapping's pages are, once that is known: from then on no report passes over them.
        self._places = np.empty(0, dtype=np.int64)
        patch.setattr(driver, "scan", self._scan_all)
        self.model = bytearray(content)
        self.writes = 0

    async def ask(self, what: str) -> Any:
        """Have the process do something; what it said."""
        script = f"cd /run/mapper; rm -f said; echo '{what}' >.ask; mv .ask ask; until [ -e said ]; do sleep 0.05; done"
        return json.loads(await self.guest.run(f"{script}; cat said"))

    async def pfns(self) -> NDArray[np.int64]:
        """Where the mapping's pages are."""
        return np.array(await self.ask("pfns"), dtype=np.int64)

    async def find(self) -> None:
        """Learn where the mapping's pages are."""
        self._places = await self.pfns()
        assert (self._places >= 0).all() and len(set(self._places.tolist())) == _PAGES

    async def _scan_all(self, link: GuestLink) -> None:
        """Have the guest report until its agent has looked at all of the mapping: it has only so much time for each
        look, which goes by too while its processor is kept waiting."""
        for _ in range(20):
            await self._scan(link)
            missed = self.guest.classes()[self._places] & STATE_MASK == PageState.VOLATILE
            if np.count_nonzero(missed) <= 0.01 * _PAGES:
                return
        raise AssertionError("the mapping is not found")

    async def end(self) -> None:
        """End the process; what becomes of its pages is the guest's affair."""
        self._places = self._places[:0]
        await self.guest.run(
            "cd /run/mapper; echo end >.ask; mv .ask ask; while [ -e /run/mapper ]; do sleep 0.05; done"
        )

    async def write(self, enough: Callable[[], bool]) -> None:
        """Have it write for a while, and until there is ``enough`` to be seen, and write the same into the model."""
        writing = asyncio.create_task(self.ask(f"write {self.writes}"))
        try:
            await asyncio.sleep(_WRITING_SECONDS)
            await until(enough, STEP_SECONDS / 2, "what is to be seen while it writes")
        finally:
            await self.guest.run("touch /run/mapper/stop")
        done = int(await writing)
        for number in range(self.writes, done):
            data = hashlib.sha256(b"%d" % number).digest()
            page, offset = struct.unpack(">IH", data[:6])
            place = page % _PAGES * PAGE_SIZE + offset % (PAGE_SIZE - len(data))
            self.model[place : place + len(data)] = data
        self.writes = done

    async def wrong(self) -> list[str]:
        """Who does not agree with the model: the mapping, the file."""
        right = hashlib.md5(self.model).hexdigest()
        return [name for name, found in (await self.ask("sums")).items() if found != right]

    def dependants(self, pfns: NDArray[np.int64]) -> int:
        """How many of these pages come back from a layer, by the ledger."""
        return len(np.intersect1d(Dependants(self.guest.qemu_pid, _MEMORY).pfns, pfns))


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def mapped(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Mapped]:
    content = random.Random(2006).randbytes(_SIZE)
    file = tmp_path_factory.mktemp("image") / "mapped"
    file.write_bytes(content)
    image = ImageConfig(name="test-mapped", files={_FILE: file})
    async with running_guest("potential", memory=_MEMORY, image=image) as guest:
        await guest.program("mapper", _FILE, _PAGES)
        with pytest.MonkeyPatch.context() as patch:
            made = Mapped(guest, content, patch)
            await made.find()
            yield made


async def test_they_are_discarded_only_when_asked_for_and_after_volatile(mapped: Mapped) -> None:
    guest = mapped.guest
    pfns = await mapped.pfns()
    result = await guest.vm.reclaim(BOTH)
    states = guest.classes()[pfns] & STATE_MASK
    assert np.count_nonzero(states == PageState.POTENTIAL) > 0.99 * _PAGES
    assert np.count_nonzero(states == PageState.VOLATILE) == 0
    assert guest.presence()[pfns].all()
    assert sum(stats.discarded_layer for stats in result.epochs) > 0

    found: list[int] = []

    def look(_stats: EpochStats) -> None:
        found.append(mapped.dependants(pfns))

    await guest.vm.reclaim((*BOTH, POTENTIAL), on_epoch=look)
    assert found[0] == 0
    assert found[-1] > 0.95 * _PAGES
    assert not guest.presence()[pfns].all()
    # Where they are mapped has not changed, and nobody has touched them.
    assert (await mapped.pfns() == pfns).all()
    assert await mapped.wrong() == []


async def test_mapping_and_file_agree_after_writes_under_epochs(mapped: Mapped) -> None:
    guest = mapped.guest
    pfns = await mapped.pfns()
    await guest.epoch(POTENTIAL)
    assert mapped.dependants(pfns) > 0.95 * _PAGES
    before = (await guest.vm.status()).measure
    guest.vm.start_reclaiming((*BOTH, POTENTIAL), 0.0)
    begun = len(guest.events)

    def with_copies() -> int:
        told = [data["stats"] for name, data in guest.events[begun:] if name == "EPOCH"]
        return sum(stats["discarded_layer"] > 0 for stats in told)

    await mapped.write(lambda: with_copies() >= 3)
    result = await guest.vm.stop_reclaiming()
    after = (await guest.vm.status()).measure
    touched = sum(stats.touched for stats in result.epochs)
    print(f"{len(result.epochs)} epochs, {mapped.writes} writes, {touched} touched")
    assert mapped.writes > 300
    assert len([stats for stats in result.epochs if stats.discarded_layer]) >= 3
    assert before is not None and after is not None
    assert after.refault_pages - before.refault_pages > 300

    assert await mapped.wrong() == []
    await guest.run("sync")
    assert await mapped.wrong() == []
    # Written back they are clean again, and no layer holds them: they stay.
    await guest.epoch(POTENTIAL)
    assert await mapped.wrong() == []
    assert await guest.complaints() == []


async def test_the_test_fails_without_the_proof(mapped: Mapped, monkeypatch: pytest.MonkeyPatch) -> None:
    """POTENTIAL pages discarded on the guest's word."""

    def believe_report(classes: NDArray[np.uint8], *rest: Any, **named: Any) -> NDArray[np.uint8]:
        wanted = members(classes, *rest, **named)
        wanted[classes & STATE_MASK == PageState.POTENTIAL] = Member.UNUSED
        return wanted

    async def confirm(
        _driver: EpochDriver, _guest: GuestLink, pager: PagerLink, epoch: bytes, part: Run, _seconds: float
    ) -> None:
        everything = np.packbits(np.ones(part.pages, dtype=np.bool_)).tobytes()
        for number in range(1, CONFIRM_ROUNDS + 1):
            await pager.call("confirm", {"epoch": epoch.hex(), "round": number}, everything)

    with monkeypatch.context() as patch:
        patch.setattr(epochs, "members", believe_report)
        patch.setattr(EpochDriver, "_confirm", confirm)
        stats = await mapped.guest.epoch(POTENTIAL)
    assert stats.discarded_zero > 100
    assert "mapping" in await mapped.wrong()


async def test_what_was_written_is_on_the_disk(mapped: Mapped) -> None:
    """The zeros of the test before were never dirty, so the disk is right: it must not depend on what came back."""
    guest = mapped.guest
    await mapped.end()
    await guest.run("sync; echo 3 >/proc/sys/vm/drop_caches")
    right = hashlib.md5(mapped.model).hexdigest()
    assert (await guest.run(f"md5sum {_FILE}")).split()[0] == right
    await guest.vm.reclaim((VOLATILE,))
    assert (await guest.run(f"md5sum {_FILE}")).split()[0] == right
    assert await guest.complaints() == []
