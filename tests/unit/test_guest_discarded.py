"""The list of discarded pages as the guest agent keeps it: what is written, when, and how much at most."""

from __future__ import annotations

import itertools
import os
import stat
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hva_guest.discarded import LIST_BYTES_MAX, DiscardedList
from hvaqemu.errors import ProtocolError
from hvaqemu.pages import Residence
from hvaqemu.protocol import DiscardedEnd, DiscardedKept, DiscardedPiece, pack_map


def send(kept: DiscardedList, kinds: bytes, size: int, number: int = 7) -> DiscardedKept:
    """Tell a whole list, ``size`` pages a piece."""
    pieces = [kinds[at : at + size] for at in range(0, len(kinds), size)]
    for place, piece in enumerate(pieces):
        kept.piece(DiscardedPiece(1, number, place, place * size, len(piece), pack_map(piece)))
    zero, layer, preserved = (kinds.count(kind) for kind in (Residence.ZERO, Residence.LAYER, Residence.PRESERVED))
    return kept.end(DiscardedEnd(1, number, len(pieces), zero, layer, preserved, 1000, 300))


def read(folder: Path) -> tuple[dict[str, str], list[str]]:
    head, _, body = (folder / "discarded").read_text().partition("\n\n")
    return dict(line.split(" ") for line in head.splitlines()), body.splitlines()


def test_the_file(tmp_path: Path) -> None:
    folder = tmp_path / "hva"
    kept = DiscardedList(str(folder))
    answer = send(kept, bytes([0, 1, 1, 2, 2, 2, 0, 0, 3, 1]), 4)
    assert answer == DiscardedKept(1, 4)
    facts, runs = read(folder)
    assert runs == ["1-2 zero", "3-5 layer", "8-8 preserved", "9-9 zero"]
    wanted = {
        "version": "1",
        "pages": "10",
        "zero": "3",
        "layer": "3",
        "preserved": "1",
        "runs": "4",
        "complete": "yes",
    }
    assert facts.items() >= {**wanted, "discarded-ever": "1000", "refaulted-ever": "300"}.items()
    assert facts["written"].endswith("Z") and float(facts["uptime"]) > 0
    assert stat.S_IMODE((folder / "discarded").stat().st_mode) == 0o644
    assert stat.S_IMODE(folder.stat().st_mode) & 0o022 == 0


def test_a_list_takes_the_place_of_the_one_before_at_once(tmp_path: Path) -> None:
    kept = DiscardedList(str(tmp_path))
    send(kept, b"\1\1", 2)
    with (tmp_path / "discarded").open() as reader:
        send(kept, b"\2\2", 2, number=8)
        assert reader.read().endswith("0-1 zero\n")
    assert read(tmp_path)[1] == ["0-1 layer"]
    assert [path.name for path in tmp_path.iterdir()] == ["discarded"]


@settings(deadline=None)
@given(st.binary(min_size=1, max_size=60).map(lambda data: bytes(value % 5 for value in data)), st.integers(1, 60))
def test_runs_are_whole_whatever_the_pieces(tmp_path_factory: pytest.TempPathFactory, kinds: bytes, size: int) -> None:
    folder = tmp_path_factory.mktemp("list")
    answer = send(DiscardedList(str(folder)), kinds, size)
    wanted, start = [], 0
    for kind, run in itertools.groupby(kinds):
        stop = start + len(list(run))
        if kind in (1, 2, 3):
            wanted.append(f"{start}-{stop - 1} {Residence(kind).name.lower()}")
        start = stop
    assert read(folder)[1] == wanted
    assert answer.runs == len(wanted)


def test_what_is_not_whole_is_no_list(tmp_path: Path) -> None:
    kept = DiscardedList(str(tmp_path))
    send(kept, b"\1\1", 2)
    piece = DiscardedPiece(1, 9, 0, 0, 2, pack_map(b"\2\2"))
    kept.piece(piece)
    for wrong in (
        piece._replace(number=2, start=2),
        piece._replace(number=1, list=10, start=2),
        piece._replace(number=1, start=1),
        piece._replace(number=1, start=2, data=b"nonsense"),
    ):
        kept.piece(piece)
        with pytest.raises(ProtocolError):
            kept.piece(wrong)
    kept.piece(piece)
    with pytest.raises(ProtocolError):
        kept.end(DiscardedEnd(1, 9, 2, 0, 4, 0, 0, 0))
    # Dropped with the session that began it.
    kept.piece(piece)
    kept.forget()
    with pytest.raises(ProtocolError):
        kept.end(DiscardedEnd(1, 9, 1, 0, 2, 0, 0, 0))
    assert read(tmp_path)[1] == ["0-1 zero"]


def test_a_list_without_end_is_bounded(tmp_path: Path) -> None:
    """16 GiB in which every second page is discarded."""
    kept = DiscardedList(str(tmp_path))
    kinds = b"\1\2\0\2" * 8192
    data = pack_map(kinds)
    tracemalloc.start()
    for number in range(128):
        kept.piece(DiscardedPiece(1, 1, number, number * len(kinds), len(kinds), data))
    answer = kept.end(DiscardedEnd(1, 1, 128, 1, 2, 0, 0, 0))
    _now, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 * LIST_BYTES_MAX
    assert (tmp_path / "discarded").stat().st_size < LIST_BYTES_MAX + 1024
    facts, runs = read(tmp_path)
    assert len(runs) == answer.runs == int(facts["runs"])
    assert (facts["zero"], facts["layer"], facts["complete"]) == ("1", "2", "no")


def test_a_disk_that_is_full_leaves_the_list_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = DiscardedList(str(tmp_path))
    send(kept, b"\1", 1)

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(OSError, match="No space"):
            send(kept, b"\2", 1)
    assert read(tmp_path)[1] == ["0-0 zero"]
    send(kept, b"\2", 1)
    assert read(tmp_path)[1] == ["0-0 layer"]
