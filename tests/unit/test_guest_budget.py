"""A guest is listened to as much as an honest one needs, and no more; what it causes is told now and then."""

from __future__ import annotations

import asyncio
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hva_host.agent import guest_notices
from hva_host.agent.guest_budget import (
    BYTES_BURST,
    BYTES_RATE,
    READ_STEPS,
    STEPS_BURST,
    STEPS_RATE,
    ReadBudget,
    TokenBucket,
)
from hva_host.agent.guest_notices import Notices
from hva_host.agent.guest_session import LinkState
from hvaqemu import protocol
from hvaqemu.protocol import encode, pack_map

_READ_BYTES = 64 * 1024


@given(
    st.lists(st.tuples(st.floats(0, 5), st.floats(0, 50)), max_size=50),
    st.floats(0.1, 100),
    st.floats(0.1, 100),
)
def test_no_more_is_spent_than_was_given(spending: list[tuple[float, float]], rate: float, burst: float) -> None:
    """Whoever waits as long as it is told to has spent its burst, what came since, and one amount at most."""
    bucket = TokenBucket(rate, burst)
    now = spent = 0.0
    for pause, amount in spending:
        now += pause
        spent += amount
        assert spent <= burst + now * rate + amount + 1e-6
        now += bucket.take(amount, now)


def test_time_that_stands_still_gives_nothing() -> None:
    bucket = TokenBucket(10, 20)
    assert bucket.take(20, 5.0) == 0
    assert bucket.take(5, 5.0) == pytest.approx(0.5)
    assert bucket.take(5, 5.0) == pytest.approx(1.0)
    assert bucket.take(0, 6.0) == 0


def piece_bytes(raw: bytes, bits: bool) -> int:
    """Bytes on the wire of a piece of 32,768 pages."""
    if bits:
        return len(encode(protocol.ConfirmPiece(1, bytes(16), 1, 0, 0, len(raw) * 8, pack_map(raw))))
    return len(encode(protocol.ScanPiece(1, 0, 0, len(raw), pack_map(raw))))


def test_epochs_of_a_16_gib_guest_are_never_waited_for() -> None:
    """Two at once, of maps that do not compress at all; as fast as the guest can make them."""
    pieces = (16 << 30 >> 12) // 32768
    chance = random.Random(1)
    scan = piece_bytes(chance.randbytes(32768), False)
    confirm = piece_bytes(chance.randbytes(32768 // 8), True)
    budget = ReadBudget()
    for _ in range(2):
        for size in (scan, confirm, confirm):
            for _piece in range(pieces):
                assert budget.charge(size, READ_STEPS + 1, 0.0) == 0, "each piece read by itself"
    # And for ever after, at the rate at which an emulated guest scans.
    now = 0.0
    for _ in range(20 * pieces):
        now += 1 / 85
        assert budget.charge(scan, READ_STEPS + 1, now) == 0


def test_output_that_is_kept_is_never_waited_for() -> None:
    budget = ReadBudget()
    size = len(encode(protocol.ExecOutput(1, 1, bytes(32768))))
    assert all(budget.charge(size, READ_STEPS + 1, 0.0) == 0 for _ in range((4 << 20) // 32768))


def test_a_flood_is_read_at_the_rates() -> None:
    for count, steps in ((_READ_BYTES, READ_STEPS), (28, READ_STEPS + 1), (_READ_BYTES, READ_STEPS + 2340)):
        budget = ReadBudget()
        now, total_bytes, total_steps = 0.0, 0, 0
        while now < 30:
            now += budget.charge(count, steps, now)
            total_bytes += count
            total_steps += steps
        assert total_bytes <= BYTES_BURST + 31 * BYTES_RATE
        assert total_steps <= STEPS_BURST + 31 * STEPS_RATE
        assert total_bytes > 25 * BYTES_RATE or total_steps > 25 * STEPS_RATE


async def test_of_many_changes_the_newest_is_told_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guest_notices, "_RATE", 5.0)
    told: list[LinkState] = []
    notices = Notices(told.append)
    for _ in range(1000):
        notices.changed(LinkState.ATTACHING)
        notices.changed(LinkState.ATTACHED)
    notices.changed(LinkState.REFUSED)
    assert len(told) == 16
    async with asyncio.timeout(5):
        while told[-1] is not LinkState.REFUSED:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert len(told) == 17
    # What comes back to what was told last is not told again.
    notices.changed(LinkState.ATTACHED)
    notices.changed(LinkState.REFUSED)
    await asyncio.sleep(0.5)
    assert len(told) <= 19 and told[-1] is LinkState.REFUSED
    notices.changed(LinkState.CLOSED)
    notices.flush()
    assert told.pop() is LinkState.CLOSED
