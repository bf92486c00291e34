"""The map of guest RAM, from a real pager's ledger and the kernel's own account of a memfd."""

from __future__ import annotations

import numpy as np
import pytest

from hva_host.agent import accounts, residences
from hva_host.agent.pager_process import PagerHandle
from hva_host.agent.ram_frames import RESIDENCES, RamMapper, shares
from hvaqemu.errors import PeerLost
from hvaqemu.pages import Residence, Run
from tests.kernel.test_pager_process import PAGES, Machine, machine  # noqa: F401

HALF = PAGES // 2


def _where(kinds: dict[int, Residence]) -> list[list[int]]:
    """The shares that RAM has whose pages are as given, and otherwise were never touched."""
    pages = np.full(PAGES, 255, dtype=np.uint8)
    for pfn, kind in kinds.items():
        pages[pfn] = kind
    found: list[list[int]] = shares(pages, RESIDENCES).tolist()
    return found


async def test_a_map_tells_resident_discarded_and_never_touched_apart(
    machine: Machine,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mapper = RamMapper(PAGES, machine.child.pid)
    frame = await mapper.frame(1.0, machine.pager, None)
    assert frame.residence_shares().tolist() == _where(dict.fromkeys(range(HALF), Residence.RESIDENT))
    assert frame.states == ""

    await machine.discard()
    await machine.read(3)
    frame = await mapper.frame(2.0, machine.pager, None)
    found = np.array(frame.residence_shares())
    assert found[RESIDENCES.index(Residence.RESIDENT), 3] == 255
    discarded = found[RESIDENCES.index(Residence.LAYER)]
    assert not discarded[HALF:].any()
    # What was filled around the page that was read is resident too, and everything else is not.
    assert np.array_equal(discarded[:HALF] == 0, found[0, :HALF] == 255)
    assert (discarded[HALF // 2 : HALF] == 255).all()

    # An older kernel tells of no memfd what it holds.
    monkeypatch.setattr(accounts, "_SYS_CACHESTAT", 100_000)
    older = (await mapper.frame(3.0, machine.pager, None)).residence_shares()
    assert np.array_equal(older[1:], found[1:])
    assert (older[0] == 255 - discarded).all()


@pytest.mark.parametrize("come_back", [False, True], ids=["discarded", "came back"])
async def test_what_moves_while_it_is_mapped_was_touched(
    machine: Machine,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    come_back: bool,
) -> None:
    asked = residences.compressed_part

    async def moving(pager: PagerHandle, part: Run) -> bytes:
        if not come_back:
            found = await asked(pager, part)
            await machine.discard()
            return found
        assert (await pager.link.call("restore"))["left"] == 0
        return await asked(pager, part)

    if come_back:
        await machine.discard()
    monkeypatch.setattr(residences, "compressed_part", moving)
    frame = await RamMapper(PAGES, machine.child.pid).frame(1.0, machine.pager, None)
    assert frame.residence_shares().tolist() == _where(dict.fromkeys(range(HALF), Residence.RESIDENT))


async def test_a_machine_that_is_gone_has_no_map(machine: Machine) -> None:  # noqa: F811
    machine.child.kill()
    with pytest.raises(PeerLost):
        await RamMapper(PAGES, machine.child.pid).frame(1.0, machine.pager, None)
