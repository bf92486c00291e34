"""The list of discarded pages, from a real pager's ledger to the guest agent's file."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from hva_guest.discarded import DiscardedList as Kept
from hva_host.agent.discarded_list import DiscardedList
from hva_host.agent.guest_link import GuestLink
from hva_host.pager.messages import RESIDENCE_PAGES_MAX
from hvaqemu.errors import PeerLost, RefusedError
from hvaqemu.protocol import DiscardedEnd, DiscardedKept, DiscardedPiece
from tests.kernel.test_pager_process import PAGES, Machine, machine  # noqa: F401


class Guest:
    """A guest agent without a guest: it keeps the list in a folder."""

    def __init__(self, folder: Path) -> None:
        self.hello = SimpleNamespace(instance=1)
        self.keeps_lists = True
        self.asked = 0
        self._folder = folder
        self._kept = Kept(str(folder))

    async def keep(self, part: DiscardedPiece | DiscardedEnd, _timeout: float) -> DiscardedKept:
        self.asked += 1
        return self._kept.piece(part) if isinstance(part, DiscardedPiece) else self._kept.end(part)

    @property
    def runs(self) -> list[str]:
        return (self._folder / "discarded").read_text().partition("\n\n")[2].splitlines()


async def test_what_the_pager_has_taken_reaches_the_file(
    machine: Machine,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("hva_host.agent.residences.RESIDENCE_PAGES_MAX", 48)
    guest = Guest(tmp_path / "hva")
    told = DiscardedList(PAGES, lambda: cast(GuestLink, guest), lambda: machine.pager)
    await machine.discard()
    await told.tell()
    assert guest.runs == [f"0-{PAGES // 2 - 1} layer"]
    assert guest.asked == -(-PAGES // 48) + 1
    # The same list is not told twice to the same agent, and to another one it is.
    await told.tell()
    assert guest.asked == -(-PAGES // 48) + 1
    guest.hello.instance = 2
    await told.tell()
    assert guest.asked == 2 * (-(-PAGES // 48) + 1)
    assert (await machine.pager.link.call("restore"))["left"] == 0
    await told.tell()
    assert guest.runs == []

    asked = guest.asked
    guest.keeps_lists = False
    guest.hello.instance = 3
    await told.tell()
    await DiscardedList(PAGES, lambda: None, lambda: machine.pager).tell()
    assert guest.asked == asked


async def test_a_guest_that_goes_meanwhile_is_told_again(
    machine: Machine,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    guest = Guest(tmp_path / "hva")
    told = DiscardedList(PAGES, lambda: cast(GuestLink, guest), lambda: machine.pager)
    await machine.discard()

    async def lost(_part: object, _timeout: float) -> DiscardedKept:
        raise PeerLost("gone")

    with monkeypatch.context() as patch:
        patch.setattr(guest, "keep", lost)
        with pytest.raises(PeerLost):
            await told.tell()
    await told.tell()
    assert guest.runs


@pytest.mark.parametrize(
    ("start", "pages"), [(0, 0), (0, PAGES + 1), (-1, 2), (PAGES, 1), (0, RESIDENCE_PAGES_MAX + 1), (1 << 70, 1)]
)
async def test_the_pager_tells_of_pages_there_are(machine: Machine, start: int, pages: int) -> None:  # noqa: F811
    with pytest.raises(RefusedError, match="residence"):
        await machine.pager.link.call("residence", {"start": start, "pages": pages})
