"""A guest says anything at any time: the session raises nothing, is bounded, and takes no answer for another's.

What must never happen is asserted by the driver after every frame; here are the guests.
"""

from __future__ import annotations

import gc
import itertools
import tracemalloc
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from hva_host.agent.guest_requests import REQUESTS_MAX
from hva_host.agent.guest_session import LinkState
from hvaqemu import protocol
from hvaqemu.errors import PeerLost
from hvaqemu.framing import MAGIC, FrameDecoder, encode_frame
from hvaqemu.pages import PageState
from hvaqemu.protocol import Message, encode, pack_map
from tests.fuzz.session_driver import KINDS, PAGES, PART, Asked, Driver

_EPOCHS = [bytes([number] * 16) for number in range(3)]
_ROUNDS = st.integers(0, 3)
u64 = st.integers(0, (1 << 64) - 1)


def hello(nonce: int, instance: int = 1, **changes: object) -> Message:
    made = protocol.Hello(nonce, 7, instance, bytes(16), 4096, ((0, PAGES),), "6.1", "0.1", 1, 1, 1, 1, ())
    return made._replace(**changes)  # type: ignore[arg-type]


def pattern(request: int, epoch: bytes, round: int) -> np.ndarray:
    """Which pages the guest says are free, different for every question."""
    seed = [request & 0xFFFFFFFF, request >> 32, epoch[0], round]
    return np.random.default_rng(seed).integers(0, 2, PAGES).astype(np.bool_)


def answer(kind: str, request: int, epoch: bytes, round: int) -> Iterator[Message]:
    """A whole answer; in two pieces where there are pieces."""
    free = pattern(request, epoch, round)
    half = PAGES // 2
    for number, part in enumerate((free[:half], free[half:])):
        if kind == "scan":
            classes = np.where(part, PageState.UNUSED, PageState.VOLATILE).astype(np.uint8)
            yield protocol.ScanPiece(request, number, number * half, half, pack_map(classes.tobytes()))
        elif kind == "confirm":
            bits = pack_map(np.packbits(part).tobytes())
            yield protocol.ConfirmPiece(request, epoch, round, number, number * half, half, bits)
    if kind == "scan":
        yield protocol.ScanEnd(request, 2, *[1] * 8)
    elif kind == "confirm":
        yield protocol.ConfirmEnd(request, epoch, round, 2, 1)
    elif kind == "stats":
        yield protocol.StatsReport(request, request & 0xFFFF, 1, 1, 1, 1)
    elif kind == "ping":
        yield protocol.Pong(request)
    else:
        yield protocol.ExecOutput(request, 1, str(request).encode())
        yield protocol.ExecEnd(request, 0, 0, 0, "")


def is_right(asked: Asked) -> bool:
    """The result is the one that was meant for this question."""
    result = asked.answer.result()
    free = pattern(asked.number, asked.epoch, asked.round)
    if asked.kind == "scan":
        return bool(((result.classes == PageState.UNUSED) == free).all())
    if asked.kind == "confirm":
        return bool((result == free[PART.start : PART.stop]).all())
    if asked.kind == "stats":
        return bool(result.memory_total_bytes == asked.number & 0xFFFF)
    return asked.kind == "ping" or bool(result.stdout == str(asked.number).encode())


class Guests(RuleBasedStateMachine):
    """A host that asks and a guest that does as it likes."""

    def __init__(self) -> None:
        super().__init__()
        self.driver = Driver()
        #: Requests of which pieces have been answered.
        self.begun: set[int] = set()
        self.greets()

    def say(self, message: Message) -> None:
        # What noise left of a frame would swallow this; it is given up in time.
        while self.driver.decoder.buffered:
            self.driver.give_up()
        self.driver.feed(encode(message))

    @rule()
    def greets(self) -> None:
        self.say(hello(self.driver.nonce))
        assert self.driver.session.state is LinkState.ATTACHED

    @rule(nonce=u64, instance=st.integers(0, 3), size=st.sampled_from([4096, 65536]), ours=st.booleans())
    def greets_somehow(self, nonce: int, instance: int, size: int, ours: bool) -> None:
        self.say(hello(self.driver.nonce if ours else nonce, instance, page_size=size))

    @rule(kind=st.sampled_from(KINDS), epoch=st.sampled_from(_EPOCHS), round=_ROUNDS)
    def host_asks(self, kind: str, epoch: bytes, round: int) -> None:
        self.driver.ask(kind, epoch, round)

    @precondition(lambda self: self.driver.asked)
    @rule(which=st.integers(0, REQUESTS_MAX))
    def answers(self, which: int) -> None:
        asked = self.driver.asked[which % len(self.driver.asked)]
        waiting = not asked.answer.done() and asked.number not in self.begun
        for message in answer(asked.kind, asked.number, asked.epoch, asked.round):
            self.say(message)
        self.begun.add(asked.number)
        if waiting:
            assert asked.answer.done() and is_right(asked)

    @precondition(lambda self: self.driver.asked)
    @rule(
        which=st.integers(0, REQUESTS_MAX),
        kind=st.sampled_from(KINDS),
        number=st.one_of(st.just(0), st.just(1 << 40), st.integers(-3, 3), u64),
        epoch=st.sampled_from(_EPOCHS),
        round=_ROUNDS,
    )
    def answers_what_was_not_asked(self, which: int, kind: str, number: int, epoch: bytes, round: int) -> None:
        """Another request, epoch, round or kind: nothing is ended by it, and nothing goes into what is right later."""
        asked = self.driver.asked[which % len(self.driver.asked)]
        request = max(0, asked.number + number) & ((1 << 64) - 1)
        right = {(other.kind, other.number) for other in self.driver.asked if other.kind != "confirm"}
        confirms = {(other.number, other.epoch, other.round) for other in self.driver.asked if other.kind == "confirm"}
        if (kind, request) in right or (kind == "confirm" and (request, epoch, round) in confirms):
            return
        done = [other.answer.done() for other in self.driver.asked]
        for message in answer(kind, request, epoch, round):
            self.say(message)
        assert done == [other.answer.done() for other in self.driver.asked]

    @precondition(lambda self: self.driver.asked)
    @rule(which=st.integers(0, REQUESTS_MAX), change=st.sampled_from(["number", "epoch", "round"]))
    def answers_nearly(self, which: int, change: str) -> None:
        """All of an answer but for one thing that says whose it is."""
        asked = self.driver.asked[which % len(self.driver.asked)]
        if change != "number" and asked.kind != "confirm":
            return
        self.answers_what_was_not_asked(
            which,
            asked.kind,
            1 << 32 if change == "number" else 0,
            _EPOCHS[asked.epoch[0] - 1] if change == "epoch" else asked.epoch,
            asked.round + 1 if change == "round" else asked.round,
        )

    @rule(request=u64, code=st.integers(0, 9), text=st.text(max_size=20))
    def refuses(self, request: int, code: int, text: str) -> None:
        self.say(protocol.Error(request, code, text))

    @precondition(lambda self: self.driver.asked)
    @rule(which=st.integers(0, REQUESTS_MAX), code=st.integers(0, 9), text=st.text(max_size=20))
    def refuses_what_was_asked(self, which: int, code: int, text: str) -> None:
        asked = self.driver.asked[which % len(self.driver.asked)]
        self.say(protocol.Error(asked.number, code, text))
        assert asked.answer.done()

    @rule(data=st.one_of(st.binary(max_size=200), st.sampled_from([MAGIC, encode_frame(0x11, bytes(90))[:60]])))
    def noise(self, data: bytes) -> None:
        self.driver.feed(data)

    @rule(kind=st.integers(0, 255), payload=st.binary(max_size=200))
    def any_frame(self, kind: int, payload: bytes) -> None:
        self.driver.feed(encode_frame(kind, payload))

    @rule()
    def goes_quiet_within_a_frame(self) -> None:
        self.driver.give_up()

    @rule(seconds=st.sampled_from([0.0, 0.1, 0.3, 11.0, 31.0, 1000.0]))
    def time_passes(self, seconds: float) -> None:
        self.driver.pass_time(seconds)

    @rule()
    def connection_breaks(self) -> None:
        self.driver.connect()

    @rule(which=st.integers(0, REQUESTS_MAX))
    def host_stops_waiting(self, which: int) -> None:
        self.driver.close(which)

    @invariant()
    def results_are_right(self) -> None:
        for asked in self.driver.asked:
            if asked.answer.done() and asked.answer.exception() is None and asked.number not in self.begun:
                pytest.fail(f"{asked.kind} has a result, and nobody answered it")

    def teardown(self) -> None:
        self.driver.end()


TestGuests = Guests.TestCase
TestGuests.settings = settings(max_examples=150, stateful_step_count=60)


def test_ten_thousand_agents_one_after_the_other_leave_nothing_behind() -> None:
    """On one connection and on one connection each; what they were asked fails at once."""
    driver = Driver()
    agents = itertools.count(2)

    def come_and_go(times: int) -> None:
        for instance in itertools.islice(agents, times):
            driver.feed(encode(hello(driver.nonce, instance)))
            asked = driver.ask("scan")
            assert asked is not None
            if instance % 2:
                driver.feed(encode(hello(0, instance + 1)))
            else:
                driver.connect()
            assert isinstance(asked.answer.exception(), PeerLost)
            driver.close(0)
            driver.pass_time(0.01)

    come_and_go(100)
    gc.collect()
    tracemalloc.start()
    try:
        come_and_go(10_000)
        gc.collect()
        assert tracemalloc.get_traced_memory()[0] < 64 * 1024
    finally:
        tracemalloc.stop()
    driver.end()


@pytest.mark.parametrize("instance", [1, 2], ids=["the same agent", "its successor"])
def test_an_answer_to_the_session_before_counts_for_nothing(instance: int) -> None:
    driver = Driver()
    driver.feed(encode(hello(driver.nonce)))
    asked = driver.ask("confirm", _EPOCHS[0], 1)
    assert asked is not None
    driver.feed(encode(hello(0, instance)))
    driver.feed(encode(hello(driver.nonce, instance)))
    again = driver.ask("confirm", _EPOCHS[0], 1)
    assert again is not None
    for message in answer("confirm", asked.number, _EPOCHS[0], 1):
        driver.feed(encode(message))
    assert isinstance(asked.answer.exception(), PeerLost)
    assert not again.answer.done()
    assert driver.session.counters.unsolicited == 3
    driver.end()


def test_a_flood_makes_us_attach_a_few_times_a_second_at_most() -> None:
    driver = Driver()
    attached = 0
    tell = driver.session._tell

    def count(message: Message) -> None:
        nonlocal attached
        attached += isinstance(message, protocol.Attach)
        tell(message)

    driver.session._tell = count
    for _ in range(10_000):
        driver.feed(encode(hello(0)) + encode(protocol.Error(0, protocol.ErrorCode.NOT_ATTACHED, "")))
        driver.pass_time(0.001)
    assert 10 <= attached <= 60
    driver.end()


def test_sizes_at_every_bound_fit_and_beyond_them_are_malformed() -> None:
    driver = Driver()
    driver.feed(encode(hello(driver.nonce)))
    asked = driver.ask("exec")
    assert asked is not None
    for size in (protocol.OUTPUT_BYTES_MAX, protocol.OUTPUT_BYTES_MAX + 1):
        payload = asked.number.to_bytes(8, "big") + b"\1" + size.to_bytes(4, "big") + bytes(size)
        driver.feed(encode_frame(protocol.MessageType.EXEC_OUTPUT, payload))
    assert (driver.session.counters.malformed, driver.session.counters.unsolicited) == (1, 0)
    largest = hello(
        driver.nonce,
        ranges=tuple((number, 1) for number in range(protocol.RANGES_MAX)),
        kernel="x" * protocol.TEXT_MAX,
        config=("y" * protocol.TEXT_MAX,) * protocol.CONFIG_NAMES_MAX,
    )
    driver.feed(encode(largest))
    assert driver.session.hello == largest
    (frame,) = FrameDecoder().feed(encode(largest))
    # One range more than there may be: the count, behind nonce, features, instance, boot id and page size.
    at = 8 + 4 + 8 + 16 + 4
    more = frame.payload[:at] + (protocol.RANGES_MAX + 1).to_bytes(2, "big") + bytes(16) + frame.payload[at + 2 :]
    driver.feed(encode_frame(frame.type, more))
    assert driver.session.counters.malformed == 2
    driver.end()
