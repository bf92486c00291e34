"""The fair balloon: sizes that are bounded whatever a guest says, and a keeper that follows what the guest needs."""

from __future__ import annotations

import asyncio
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hva_host.compare import balloon_keeper
from hva_host.compare.balloon import (
    FAULTS_PER_SECOND,
    RESERVE_SHARE,
    STEP_SHARE,
    UNIT,
    Bounds,
    Word,
    next_size,
    reserve,
    reserve_share,
)
from hva_host.compare.balloon_keeper import BalloonKeeper
from hvaqemu.errors import DeadlineExceeded
from hvaqemu.qemu.guest_stats import GuestStats, guest_stats
from hvaqemu.units import MiB
from tests.unit.compare_stand_ins import StandInMonitor

BOUNDS = Bounds(64 * MiB, 512 * MiB)
sizes = st.integers(BOUNDS.least // UNIT, BOUNDS.most // UNIT).map(lambda units: units * UNIT)
words = st.builds(
    Word, at=st.integers(0, 100), available=st.integers(0, BOUNDS.most), major_faults=st.integers(0, 10**6)
)


@given(size=sizes, word=words, before=st.none() | words, may_shrink=st.booleans())
def test_whatever_a_guest_says_a_step_is_bounded(size: int, word: Word, before: Word | None, may_shrink: bool) -> None:
    wanted = next_size(size, BOUNDS, word, before, may_shrink=may_shrink)
    assert BOUNDS.least <= wanted <= BOUNDS.most
    assert wanted % UNIT == 0
    if wanted < size:
        assert may_shrink
        assert size - wanted <= size * STEP_SHARE
        # What goes is what the guest has to spare, and its reserve stays.
        assert word.available - (size - wanted) >= reserve(size)
    if word.available < reserve(size):
        missing = reserve(size) - word.available
        assert wanted - size >= min(missing, BOUNDS.most - size)


@given(size=sizes, word=words)
def test_a_guest_with_its_reserve_and_nothing_more_is_left_alone(size: int, word: Word) -> None:
    exact = Word(word.at, reserve(size), word.major_faults)
    assert next_size(size, BOUNDS, exact, None, may_shrink=True) == size


def test_a_guest_that_reads_its_programs_again_grows() -> None:
    before = Word(10, 200 * MiB, 1000)
    assert next_size(
        256 * MiB, BOUNDS, Word(12, 200 * MiB, 1000 + int(2 * FAULTS_PER_SECOND)), before, may_shrink=True
    ) < (256 * MiB)
    suffering = Word(12, 200 * MiB, 1001 + int(2 * FAULTS_PER_SECOND))
    assert next_size(256 * MiB, BOUNDS, suffering, before, may_shrink=True) > 256 * MiB
    swapping = Word(12, 200 * MiB, 1000, swapped_in=4096)
    assert next_size(256 * MiB, BOUNDS, swapping, before, may_shrink=True) > 256 * MiB
    # Nothing is missing: it has all there is.
    assert next_size(512 * MiB, BOUNDS, suffering, before, may_shrink=True) == 512 * MiB


def test_on_a_host_that_is_short_guests_are_left_less() -> None:
    shares = [reserve_share(free / 100) for free in range(101)]
    assert shares == sorted(shares)
    assert reserve_share(1.0) == reserve_share(0.2) == RESERVE_SHARE
    assert reserve_share(0.1) == pytest.approx(0.1)
    assert reserve_share(0.05) == 0
    assert reserve_share(0.0) == pytest.approx(-0.05)

    size, word = 400 * MiB, Word(9, 60 * MiB)
    assert next_size(size, BOUNDS, word, None, may_shrink=True) > size
    assert next_size(size, BOUNDS, word, None, may_shrink=True, share=0.1) < size
    # At the host's end a guest is to swap, and that is no reason to grow.
    pressed, before = Word(9, 4 * MiB, swapped_in=9), Word(8, 4 * MiB)
    assert next_size(size, BOUNDS, pressed, before, may_shrink=True, share=-0.05) < size
    assert next_size(size, BOUNDS, pressed, before, may_shrink=True, share=0.01) > size


async def hear(keeper: BalloonKeeper, monitor: StandInMonitor, times: int) -> None:
    for _ in range(times):
        await keeper.heard(await guest_stats(monitor))


async def test_it_settles_where_the_guests_word_says_and_then_only_grows() -> None:
    monitor = StandInMonitor(used=80 * MiB)
    keeper = BalloonKeeper(monitor, BOUNDS)
    await hear(keeper, monitor, 5)
    assert monitor.sizes == [], "nobody has asked for anything"

    settling = asyncio.create_task(keeper.settle())
    await asyncio.sleep(0)
    await hear(keeper, monitor, 60)
    await settling
    # Used, and a fifth of all as a reserve.
    assert monitor.size == pytest.approx(100 * MiB, abs=3 * MiB)
    assert monitor.sizes == sorted(monitor.sizes, reverse=True)

    least = monitor.size
    monitor.used = 60 * MiB
    await hear(keeper, monitor, 10)
    assert monitor.size == least
    monitor.used = 200 * MiB
    await hear(keeper, monitor, 1)
    # All that its word shows to be missing; that it is short of more only the next one can show.
    assert monitor.size >= least + reserve(least)
    await hear(keeper, monitor, 6)
    assert monitor.size - monitor.used >= reserve(monitor.size)
    await keeper.deflate()
    assert monitor.size == 512 * MiB


async def test_after_it_had_to_grow_it_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monitor = StandInMonitor()
    keeper = BalloonKeeper(monitor, BOUNDS)
    keeper.shrinking = True
    await hear(keeper, monitor, 5)
    monitor.used = monitor.size
    await hear(keeper, monitor, 1)
    grown, monitor.used = monitor.size, 60 * MiB
    await hear(keeper, monitor, 5)
    assert monitor.size == grown
    monkeypatch.setattr(balloon_keeper, "_HOLD_SECONDS", 0.0)
    await hear(keeper, monitor, 1)
    assert monitor.size < grown


async def settled(keeper: BalloonKeeper, monitor: StandInMonitor, words: int = 80) -> None:
    """Settle, with so many words of the guest's at most."""
    settling = asyncio.create_task(keeper.settle())
    await asyncio.sleep(0)
    for _ in range(words):
        await hear(keeper, monitor, 1)
        await asyncio.sleep(0)
        if settling.done():
            break
    assert settling.done(), f"not settled after {words} words"
    await settling


async def test_who_asks_to_settle_gets_it_however_lately_the_guest_grew() -> None:
    monitor = StandInMonitor(used=80 * MiB)
    keeper = BalloonKeeper(monitor, BOUNDS)
    await settled(keeper, monitor)
    first = monitor.size
    assert first < 110 * MiB
    # `restore`, and at once `reclaim`.
    await keeper.deflate()
    await hear(keeper, monitor, 3)
    assert monitor.size == 512 * MiB
    await settled(keeper, monitor)
    assert monitor.size == pytest.approx(first, abs=3 * MiB)
    # It grew on demand, is held, and then the demand is gone.
    monitor.used = 200 * MiB
    await hear(keeper, monitor, 6)
    grown, monitor.used = monitor.size, 80 * MiB
    assert grown > 200 * MiB
    await settled(keeper, monitor)
    assert monitor.size == pytest.approx(first, abs=3 * MiB)


async def test_words_of_a_held_balloon_settle_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monitor = StandInMonitor()
    keeper = BalloonKeeper(monitor, BOUNDS)
    settling = asyncio.create_task(keeper.settle())
    await asyncio.sleep(0)
    monitor.used = 500 * MiB
    await hear(keeper, monitor, 1)
    monitor.used = 400 * MiB
    monitor.size = monitor.wanted = 450 * MiB
    await hear(keeper, monitor, 2)
    monitor.used = 60 * MiB
    grown = monitor.size
    await hear(keeper, monitor, 20)
    await asyncio.sleep(0)
    assert monitor.size == grown
    assert not settling.done(), "none of those words could have shrunk it"
    monkeypatch.setattr(balloon_keeper, "_HOLD_SECONDS", 0.0)
    await hear(keeper, monitor, 80)
    await settling
    assert monitor.size < 100 * MiB


async def test_an_old_word_or_none_decides_nothing() -> None:
    monitor = StandInMonitor()
    keeper = BalloonKeeper(monitor, BOUNDS)
    keeper.shrinking = True
    await hear(keeper, monitor, 1)
    (first,) = monitor.sizes
    # Said before that change: what the guest would have to spare twice.
    await keeper.heard(GuestStats(updated=1, available=450 * MiB))
    await keeper.heard(GuestStats(updated=2**40))
    assert monitor.sizes == [first]

    monitor = StandInMonitor()
    keeper = BalloonKeeper(monitor, BOUNDS)
    keeper.shrinking = True
    said = GuestStats(updated=int(time.time()), available=450 * MiB)
    await keeper.deflate()
    await keeper.heard(said)
    assert monitor.sizes == [512 * MiB], "a word of before it had all of its memory was taken up"


async def test_while_a_step_down_is_under_way_there_is_no_other() -> None:
    monitor = StandInMonitor()
    monitor.pace = 4 * MiB
    keeper = BalloonKeeper(monitor, BOUNDS)
    keeper.shrinking = True
    await hear(keeper, monitor, 6)
    # A twentieth in steps of 4 MiB: it gives all the time, and is asked once.
    assert len(monitor.sizes) == 1
    monitor.used = monitor.size - 20 * MiB
    await hear(keeper, monitor, 1)
    # Demand does not wait for that step.
    assert monitor.sizes[1] > monitor.sizes[0]
    assert monitor.size == monitor.sizes[1]


async def test_a_guest_that_can_give_no_more_has_settled(monkeypatch: pytest.MonkeyPatch) -> None:
    monitor = StandInMonitor()
    monitor.least = 500 * MiB
    keeper = BalloonKeeper(monitor, BOUNDS)
    await settled(keeper, monitor, 12)
    assert monitor.sizes[0] < 500 * MiB
    # What it was asked for is taken back, once, and said.
    assert monitor.sizes[1:] == [500 * MiB]
    assert keeper.remarks == ["the balloon could not take the guest below 500.0 MiB"]
    # Once it has grown, it may be able to give more.
    monitor.used, monitor.least = 450 * MiB, 0
    await hear(keeper, monitor, 1)
    monitor.used = 60 * MiB
    monkeypatch.setattr(balloon_keeper, "_HOLD_SECONDS", 0.0)
    keeper.shrinking = True
    await hear(keeper, monitor, 60)
    assert monitor.size < 100 * MiB


async def test_a_guest_that_stood_still_is_not_stuck() -> None:
    monitor = StandInMonitor()
    monitor.least = 500 * MiB
    keeper = BalloonKeeper(monitor, BOUNDS)
    keeper.shrinking = True
    while not monitor.sizes:
        await hear(keeper, monitor, 1)
    await hear(keeper, monitor, 1)
    # Its next word comes a minute later.
    monitor.ahead += 60
    await hear(keeper, monitor, 1)
    assert not keeper.remarks
    monitor.least = 0
    await hear(keeper, monitor, 60)
    assert not keeper.remarks
    assert monitor.size < 100 * MiB


async def test_a_guest_that_takes_memory_back_by_itself_is_held() -> None:
    monitor = StandInMonitor()
    keeper = BalloonKeeper(monitor, BOUNDS)
    keeper.shrinking = True
    await hear(keeper, monitor, 10)
    # deflate_on_oom: QEMU's wish stays what it was.
    monitor.size = monitor.wanted = monitor.size + 50 * MiB
    taken = monitor.size
    await hear(keeper, monitor, 3)
    assert monitor.sizes[-1] == monitor.size == taken


async def test_a_silent_guest_is_said_to_be_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(balloon_keeper, "_SETTLE_SECONDS", 0.05)
    keeper = BalloonKeeper(StandInMonitor(), BOUNDS)
    with pytest.raises(DeadlineExceeded, match="says nothing of its memory"):
        await keeper.settle()
    assert await keeper.broken(0.05) == "its driver says nothing of its memory"


async def test_one_that_comes_to_no_rest_goes_on_with_a_remark(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(balloon_keeper, "_SETTLE_SECONDS", 0.05)
    monitor = StandInMonitor()
    keeper = BalloonKeeper(monitor, BOUNDS)
    settling = asyncio.create_task(keeper.settle())
    await asyncio.sleep(0)
    await hear(keeper, monitor, 2)
    await settling
    assert keeper.remarks == ["the balloon came to no rest within 0.05 s of a reclaim"]
    assert not keeper.shrinking
    assert await keeper.broken(0.05) == ""


async def test_a_balloon_whose_guest_gives_nothing_does_not_work() -> None:
    monitor = StandInMonitor()
    monitor.least = 512 * MiB
    keeper = BalloonKeeper(monitor, BOUNDS)
    await hear(keeper, monitor, 2)
    # Nobody has asked it.
    assert await keeper.broken(0.05) == ""
    await settled(keeper, monitor, 12)
    assert await keeper.broken(0.05) == "its guest was asked for memory and gave none"


async def test_what_a_guest_does_not_tell_is_not_known() -> None:
    stats = await guest_stats(StandInMonitor(used=12 * MiB))
    assert stats.available == 500 * MiB
    monitor = StandInMonitor()
    answer = await monitor.execute("qom-get")
    assert isinstance(answer, dict)
    answer["stats"]["stat-available-memory"] = (1 << 64) - 1
    assert GuestStats.model_validate(answer["stats"]).available is None
