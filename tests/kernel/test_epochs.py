"""The discard transaction: whatever happens between its steps, nothing but what is proven goes."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from hva_host.pager import protection
from hva_host.pager.epoch import Epoch, Phase, Step
from hva_host.pager.membership import Member
from hvaqemu.pages import Residence, Run
from tests.kernel.harness import PAGES, ZERO, Guest, block, crc, make_layer


def kinds(guest: Guest) -> list[int]:
    return [int(entry) >> 60 for entry in guest.ram.ledger.entries]


def until(steps: Iterator[Step], epoch: Epoch, phase: Phase) -> None:
    for _ in steps:
        if epoch.phase is phase:
            return
    raise AssertionError(f"the epoch never was {phase}")


def test_unused_goes_only_after_two_scans(guest: Guest) -> None:
    guest.write(1, "old")
    guest.run(guest.begin({1: Member.UNUSED}, seconds=0.05), confirm=False)
    assert kinds(guest)[1] == Residence.RESIDENT
    epoch = guest.begin({1: Member.UNUSED}, seconds=0.2)
    free = np.ones(PAGES, dtype=np.bool_)
    for _ in epoch.steps():
        if epoch.identifier:
            epoch.confirm(epoch.identifier, 1, free)
            assert not epoch.confirm(epoch.identifier, 1, free), "a repeated answer counts once"
    assert kinds(guest)[1] == Residence.RESIDENT
    assert epoch.counts["unconfirmed"] == 1
    assert "did not confirm" in epoch.note
    guest.run(guest.begin({1: Member.UNUSED}))
    assert kinds(guest)[1] == Residence.ZERO


def test_late_repeated_and_foreign_confirmations_count_for_nothing(guest: Guest) -> None:
    guest.write(1, "old")
    earlier = guest.begin({1: Member.UNUSED}, seconds=0.05)
    guest.run(earlier, confirm=False)
    free = np.ones(PAGES, dtype=np.bool_)
    assert not earlier.confirm(earlier.identifier, 1, free), "late"
    epoch = guest.begin({1: Member.UNUSED}, seconds=0.1)
    assert not epoch.confirm(b"", 1, free), "before anything is protected there is nothing to answer"
    for _ in epoch.steps():
        assert not epoch.confirm(earlier.identifier, 1, free), "an earlier epoch's"
        assert not epoch.confirm(os.urandom(16), 1, free), "nobody's"
        if epoch.identifier:
            assert not epoch.confirm(epoch.identifier, 3, free), "a round never asked for"
            assert not epoch.confirm(epoch.identifier, 0, free)
            assert not epoch.confirm(epoch.identifier, 1, free[:-1]), "of another guest"
    assert kinds(guest)[1] == Residence.RESIDENT


def test_a_page_not_free_in_one_scan_stays(guest: Guest) -> None:
    for pfn in (1, 2):
        guest.write(pfn, "x")
    epoch = guest.begin({1: Member.UNUSED, 2: Member.UNUSED})
    first, second = np.ones(PAGES, dtype=np.bool_), np.ones(PAGES, dtype=np.bool_)
    second[2] = False
    for _ in epoch.steps():
        if epoch.identifier:
            epoch.confirm(epoch.identifier, 1, first)
            epoch.confirm(epoch.identifier, 2, second)
    assert kinds(guest)[1:3] == [Residence.ZERO, Residence.RESIDENT]


@pytest.mark.parametrize("phase", [Phase.PROVING, Phase.CONFIRMING])
def test_a_write_between_protect_and_discard_keeps_the_page(guest: Guest, tmp_path: Path, phase: Phase) -> None:
    guest.ram.add_layer(make_layer(tmp_path, [block(i) for i in range(PAGES)]))
    for pfn in range(8):
        guest.fill(pfn, block(pfn))
    members = {pfn: Member.UNUSED if pfn % 2 else Member.COPY for pfn in range(8)}
    epoch = guest.begin(members)
    steps = epoch.steps()
    if phase is Phase.PROVING:
        next(steps)
        while not epoch.identifier:
            next(steps)
    else:
        until(steps, epoch, phase)
    guest.write(1, "written-now")
    wanted = b"written-now" + block(1)[11:]
    guest.confirm_all(epoch)
    for _ in steps:
        pass
    assert kinds(guest)[1] == Residence.RESIDENT
    assert guest.checksum(1) == crc(wanted)
    assert epoch.counts["touched"] == 1
    assert [guest.checksum(pfn) for pfn in (0, 2, 4)] == [crc(block(pfn)) for pfn in (0, 2, 4)]


def test_a_write_that_waits_while_its_page_is_discarded_lands_on_the_same_bytes(guest: Guest, tmp_path: Path) -> None:
    guest.ram.add_layer(make_layer(tmp_path, [block(0)]))
    guest.fill(3, block(0))
    epoch = guest.begin({3: Member.COPY})
    steps = epoch.steps()
    while not epoch.identifier:
        next(steps)
    guest.send("w 3 late")
    time.sleep(0.05)
    for _ in steps:
        pass
    assert kinds(guest)[3] == Residence.LAYER
    assert guest.reply() == "ok"
    assert guest.checksum(3) == crc(b"late" + block(0)[4:])


def test_an_absent_page_is_not_discarded_by_the_epoch_that_protected_it(guest: Guest) -> None:
    guest.write(20, "present")
    epoch = guest.begin({9: Member.UNUSED, 10: Member.COPY, 20: Member.UNUSED})
    steps = epoch.steps()
    while not epoch.identifier:
        next(steps)
    guest.write(9, "fresh")
    guest.write(10, "fresh")
    guest.confirm_all(epoch)
    for _ in steps:
        pass
    assert epoch.counts["candidates"] == 1
    assert kinds(guest)[9:11] == [Residence.RESIDENT] * 2
    assert guest.checksum(9) == crc(b"fresh" + ZERO[5:])


def test_sifting_proposes_zeros_and_protects_nothing_else(guest: Guest, tmp_path: Path) -> None:
    guest.ram.add_layer(make_layer(tmp_path, [block(0)]))
    guest.fill(1, block(0))
    guest.fill(2, ZERO)
    guest.fill(3, block(77))
    epoch = guest.begin(dict.fromkeys((1, 2, 3), Member.SIFT))
    guest.run(epoch)
    assert epoch.counts["candidates"] == 1
    assert kinds(guest)[1:4] == [Residence.RESIDENT, Residence.ZERO, Residence.RESIDENT]


def test_an_epoch_over_a_part_leaves_the_others_alone(guest: Guest, tmp_path: Path) -> None:
    guest.ram.add_layer(make_layer(tmp_path, [block(number) for number in range(PAGES)]))
    for pfn in range(PAGES):
        guest.fill(pfn, block(pfn))
    part = Run(PAGES // 4, PAGES // 2)
    members = {pfn: Member.COPY if pfn % 2 else Member.UNUSED for pfn in range(part.start, part.stop)}
    epoch = guest.begin(members, part=part)
    touched = part.start + 2
    for _ in epoch.steps():
        if epoch.identifier and not epoch._confirmed:
            # Before, behind and inside.
            for pfn in (0, part.start - 1, part.stop, PAGES - 1, touched):
                epoch.leave(pfn, pfn + 1)
            assert not epoch.confirm(epoch.identifier, 1, np.ones(PAGES, dtype=np.bool_)), "an answer for all"
            guest.confirm_all(epoch)
    found = kinds(guest)
    for pfn in range(PAGES):
        inside = part.start <= pfn < part.stop and pfn != touched
        assert found[pfn] == ((Residence.LAYER if pfn % 2 else Residence.ZERO) if inside else Residence.RESIDENT)
    assert epoch.counts["touched"] == 1
    for pfn in range(1, PAGES, 2):
        assert guest.checksum(pfn) == crc(block(pfn))
    for first, pages in ((-1, 1), (PAGES, 1), (PAGES - 1, 2), (0, 0)):
        with pytest.raises(ValueError, match="classes of pages"):
            Epoch(guest.ram, guest.prover, np.zeros(pages, dtype=np.uint8), 1.0, first)


def test_an_epoch_abandoned_while_it_still_chooses_discards_nothing(guest: Guest) -> None:
    for pfn in range(PAGES):
        guest.fill(pfn, ZERO)
    epoch = guest.begin(dict.fromkeys(range(PAGES), Member.SIFT))
    steps = epoch.steps()
    until(steps, epoch, Phase.SIFTING)
    epoch.abandon("for a test")
    for _ in steps:
        pass
    assert epoch.note == "for a test"
    assert epoch.phase is Phase.DONE
    assert kinds(guest) == [Residence.RESIDENT] * PAGES


def test_what_the_deadline_leaves_unprotected_is_left_alone(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every protection takes longer than the epoch may; each other page is a run of its own."""
    monkeypatch.setattr(protection, "_SLICE_SECONDS", -1.0)
    for pfn in range(PAGES):
        guest.fill(pfn, ZERO)
    epoch = guest.begin(dict.fromkeys(range(0, PAGES, 2), Member.COPY), seconds=-1.0)
    guest.run(epoch)
    assert "before all pages were protected" in epoch.note
    assert kinds(guest) == [Residence.ZERO] + [Residence.RESIDENT] * (PAGES - 1)
    assert epoch.counts["candidates"] == 1


def test_protection_ends_with_the_epoch(guest: Guest) -> None:
    guest.write(4, "x")
    guest.run(guest.begin({4: Member.UNUSED}, seconds=0.02), confirm=False)
    guest.send("w 4 y")
    assert guest.answered(5), "a page still protected: nobody serves faults here"
    assert guest.reply() == "ok"


def test_an_abandoned_epoch_discards_nothing_more_and_unprotects(guest: Guest) -> None:
    guest.write(4, "x")
    epoch = guest.begin({4: Member.UNUSED})
    steps = epoch.steps()
    until(steps, epoch, Phase.CONFIRMING)
    guest.confirm_all(epoch)
    epoch.abandon("why not")
    for _ in steps:
        pass
    assert kinds(guest)[4] == Residence.RESIDENT
    assert (epoch.note, epoch.counts["unconfirmed"]) == ("why not", 1)


def test_a_failed_punch_leaves_present_pages_without_entry(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    guest.write(4, "x")
    guest.write(6, "x")
    punch = guest.ram.backing.punch

    def full(run: Run) -> None:
        if run.start == 6:
            raise OSError(12, "Cannot allocate memory")
        punch(run)

    monkeypatch.setattr(guest.ram.backing, "punch", full)
    epoch = guest.begin({4: Member.UNUSED, 6: Member.UNUSED})
    guest.run(epoch)
    assert kinds(guest)[4] == Residence.ZERO
    assert kinds(guest)[6] == Residence.RESIDENT
    assert "Cannot allocate memory" in epoch.note


#: What a host agent asks for.
_ASKED = [member for member in Member if member is not Member.NO_COPY]

actions = st.lists(
    st.tuples(st.sampled_from(["read", "write", "write", "punch", "none"]), st.integers(0, 15)), min_size=8, max_size=40
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    plan=actions,
    members=st.lists(st.sampled_from([*_ASKED, Member.UNUSED, Member.UNUSED]), min_size=16, max_size=16),
    content=st.lists(st.sampled_from(["zero", "layer", "own", "soft", "same", "absent"]), min_size=16, max_size=16),
    free=st.lists(st.sampled_from([True, True, False]), min_size=16, max_size=16),
    slice_pages=st.sampled_from([1, 3, 512]),
    early=st.booleans(),
)
def test_no_interleaving_changes_a_byte_that_matters(
    guest: Guest,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    plan: list[tuple[str, int]],
    members: list[Member],
    content: list[str],
    free: list[bool],
    slice_pages: int,
    early: bool,
) -> None:
    """Reads, writes and balloon punches at every point where the pager gives way; the guest's view stays right."""
    if not guest.ram.layers:
        guest.ram.add_layer(make_layer(tmp_path_factory.mktemp("layer"), [block(i) for i in range(16)]))
    monkeypatch.setattr(guest.prover, "pages", slice_pages)
    monkeypatch.setattr("hva_host.pager.epoch._DISCARD_PAGES", slice_pages)
    monkeypatch.setattr("hva_host.pager.protection._SLICE_SECONDS", 0.0)
    monkeypatch.setattr("hva_host.pager.epoch.SLICE_PAGES", min(slice_pages, 32))
    monkeypatch.setattr(guest.samples.stable, "_shares", np.ones(1, dtype=np.float32))
    monkeypatch.setattr(guest.samples.stable, "_hot", 1e9)
    monkeypatch.setattr("hva_host.pager.coldness.WATCHED_SECONDS", 0.0)
    monkeypatch.setattr("hva_host.pager.coldness._REST_TICKS", 0)
    guest.ram.backing.punch(Run(0, PAGES))
    guest.ram.erase(0, guest.ram.pages)
    assert guest.ram.store.used_bytes() == 0
    model = [ZERO] * 16
    for pfn, kind in enumerate(content):
        if kind != "absent":
            soft, same = b"%4d" % pfn * 1024, b"same" * 1024
            own = {"zero": ZERO, "layer": block(pfn), "own": block(pfn + 100), "soft": soft, "same": same}
            model[pfn] = own[kind]
            guest.fill(pfn, model[pfn])
    # The guest says the truth: a page it calls free holds nothing that matters until it is written again.
    matters = [not (members[pfn] is Member.UNUSED and free[pfn]) for pfn in range(16)]
    written = [False] * 16
    absent_at_protect: set[int] = set()
    punched: set[int] = set()
    epoch = guest.begin(dict(enumerate(members)))
    scan = np.zeros(PAGES, dtype=np.bool_)
    plan = list(plan)

    def act() -> None:
        if not plan:
            return
        verb, pfn = plan.pop()
        if verb == "read":
            guest.checksum(pfn)
        elif verb == "punch":
            guest.ram.backing.punch(Run(pfn, 1))
            punched.add(pfn)
            if guest.ram.ledger.entries[pfn] == 0:
                model[pfn] = ZERO
        elif verb == "write":
            text = f"w{len(plan):03}"
            guest.write(pfn, text)
            model[pfn] = text.encode() + model[pfn][4:]
            written[pfn] = True
            scan[pfn] = False

    protected = False
    for _ in epoch.steps():
        if epoch.identifier and not protected:
            protected = True
            present = guest.ram.backing.presence(0, 16)
            absent_at_protect = {pfn for pfn in range(16) if not present[pfn] and not guest.ram.ledger.entries[pfn]}
        act()
        if epoch.identifier and (early or epoch.phase is Phase.CONFIRMING) and not epoch._confirmed:
            scan[:16] = [free[pfn] and not written[pfn] for pfn in range(16)]
            epoch.confirm(epoch.identifier, 1, scan.copy())
            act()
            scan[:16] = [free[pfn] and not written[pfn] for pfn in range(16)]
            epoch.confirm(epoch.identifier, 2, scan.copy())
    if any(member is Member.STABLE and kind == "soft" for member, kind in zip(members, content, strict=True)):
        event("asked to page something out")
    if epoch.counts["discarded_store"]:
        event("paged out")
    # A page the balloon took after protection comes back as zeros, with an entry or without.
    for pfn in absent_at_protect - punched:
        assert guest.ram.ledger.entries[pfn] == 0
    for pfn in range(16):
        guest.send(f"r {pfn}")
        head, checksum = guest.reply().split()
        if matters[pfn]:
            assert int(checksum) == crc(model[pfn]), pfn
        elif written[pfn]:
            assert bytes.fromhex(head)[:4] == model[pfn][:4], pfn
    counts = epoch.counts
    discarded = counts["discarded_zero"] + counts["discarded_layer"] + counts["discarded_store"]
    kept = counts["touched"] + counts["unmatched"] + counts["unconfirmed"] + counts["unpreserved"]
    assert counts["candidates"] == discarded + kept


def test_nothing_is_compared_before_direct_io_was_drained(guest: Guest, tmp_path: Path) -> None:
    """What a transfer that was under way brings past the protection is seen, because it is compared afterwards."""
    guest.ram.add_layer(make_layer(tmp_path, [block(0), block(1)]))
    for pfn in (0, 1):
        guest.fill(pfn, block(pfn))
    guest.write(5, "free")
    epoch = guest.begin({0: Member.COPY, 1: Member.COPY, 5: Member.UNUSED}, drain=True)
    steps = epoch.steps()
    until(steps, epoch, Phase.DRAINING)
    assert epoch.wants_drain()
    assert not epoch.drained(os.urandom(16)), "nobody's word"
    for _ in range(20):
        assert next(steps) is Step.CONFIRM
    assert kinds(guest)[:2] == [0, 0]
    # Through the memfd, as direct I/O through a pinned page: no protection stops it.
    guest.fill(1, block(77))
    assert epoch.drained(epoch.identifier)
    assert not epoch.drained(epoch.identifier), "once"
    guest.confirm_all(epoch)
    for _ in steps:
        pass
    assert kinds(guest)[:2] == [Residence.LAYER, Residence.RESIDENT]
    assert kinds(guest)[5] == Residence.ZERO
    assert guest.checksum(1) == crc(block(77))


def test_direct_io_that_is_never_drained_keeps_the_copies(guest: Guest, tmp_path: Path) -> None:
    guest.ram.add_layer(make_layer(tmp_path, [block(0)]))
    guest.fill(0, block(0))
    epoch = guest.begin({0: Member.COPY, 1: Member.STABLE}, seconds=0.05, drain=True)
    guest.run(epoch)
    assert epoch.note == "direct I/O was not drained in time"
    assert kinds(guest)[0] == Residence.RESIDENT
    assert epoch.counts["unmatched"] == 1
