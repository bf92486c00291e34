"""Every message survives the wire; no bytes make decoding do anything but return or raise ProtocolError."""

from __future__ import annotations

import contextlib
import tracemalloc
import zlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvaqemu import protocol
from hvaqemu.errors import ProtocolError
from hvaqemu.framing import Frame, FrameDecoder
from hvaqemu.protocol import Fact, Feature, Hello, Message, MessageType, decode, encode, pack_map, unpack_map

u8, u16, u32, u64 = (st.integers(0, (1 << bits) - 1) for bits in (8, 16, 32, 64))
identifier = st.binary(min_size=16, max_size=16)
text = st.text(max_size=60)
pages = st.integers(1, protocol.PIECE_PAGES_MAX)
blob = st.binary(max_size=400)
#: A CONFIRM without the fields that say which part.
_CONFIRM_BYTES = 8 + 16 + 1
#: A STATS_REPORT without the fields that came later.
_STATS_BYTES = 5 * 8 + 4

messages: dict[type, st.SearchStrategy[Any]] = {
    protocol.Attach: st.builds(protocol.Attach, u64, u32),
    protocol.Hello: st.builds(
        protocol.Hello,
        *(u64, u32, u64, identifier, u32, st.lists(st.tuples(u64, u64), max_size=64).map(tuple), text, text),
        *(u8, u8, u8, u8, st.lists(text, max_size=32).map(tuple)),
    ),
    protocol.Ack: st.builds(protocol.Ack, u32),
    protocol.Ping: st.builds(protocol.Ping, u64),
    protocol.Pong: st.builds(protocol.Pong, u64),
    protocol.Error: st.builds(protocol.Error, u64, u16, text),
    protocol.Scan: st.builds(protocol.Scan, u64),
    protocol.ScanPiece: st.builds(protocol.ScanPiece, u64, u32, u64, pages, blob),
    protocol.ScanEnd: st.builds(protocol.ScanEnd, u64, u32, u64, u64, u64, u64, u64, u64, u64, u64),
    protocol.Confirm: st.builds(protocol.Confirm, u64, identifier, u8, u64, u64),
    protocol.ConfirmPiece: st.builds(protocol.ConfirmPiece, u64, identifier, u8, u32, u64, pages, blob),
    protocol.ConfirmEnd: st.builds(protocol.ConfirmEnd, u64, identifier, u8, u32, u64),
    protocol.DiscardedPiece: st.builds(protocol.DiscardedPiece, u64, u64, u32, u64, pages, blob),
    protocol.DiscardedEnd: st.builds(protocol.DiscardedEnd, u64, u64, u32, u64, u64, u64, u64, u64),
    protocol.DiscardedKept: st.builds(protocol.DiscardedKept, u64, u32),
    protocol.Stats: st.builds(protocol.Stats, u64),
    protocol.StatsReport: st.builds(protocol.StatsReport, u64, u64, u64, u64, u64, u32, u32, u64),
    protocol.Exec: st.builds(protocol.Exec, u64, st.lists(blob, max_size=20).map(tuple), u32, blob),
    protocol.ExecOutput: st.builds(protocol.ExecOutput, u64, u8, blob),
    protocol.ExecEnd: st.builds(protocol.ExecEnd, u64, u8, u32, u8, text),
    protocol.ExecCancel: st.builds(protocol.ExecCancel, u64),
}


def test_every_type_is_tried() -> None:
    assert len(messages) == len(MessageType)


@given(st.one_of(*messages.values()))
def test_round_trip(message: Message) -> None:
    (frame,) = FrameDecoder().feed(encode(message))
    found = decode(frame)
    assert type(found) is type(message)
    assert found == message


@given(st.one_of(*messages.values()), st.binary(max_size=20))
def test_fields_a_later_version_adds_are_ignored(message: Message, more: bytes) -> None:
    (frame,) = FrameDecoder().feed(encode(message))
    assert decode(Frame(frame.type, frame.payload + more)) == message


@given(st.one_of(*messages.values()), st.integers(0, 10_000))
def test_a_message_cut_short_is_an_error(message: Message, cut: int) -> None:
    (frame,) = FrameDecoder().feed(encode(message))
    cut %= len(frame.payload)
    if isinstance(message, protocol.Confirm) and cut in (_CONFIRM_BYTES, _CONFIRM_BYTES + 8):
        # Where versions end that do not know of parts.
        found = decode(Frame(frame.type, frame.payload[:cut]))
        assert isinstance(found, protocol.Confirm)
        assert found[:3] == message[:3]
        assert found.pages == 0
        return
    if isinstance(message, protocol.StatsReport) and cut in (_STATS_BYTES, _STATS_BYTES + 4):
        older = decode(Frame(frame.type, frame.payload[:cut]))
        assert isinstance(older, protocol.StatsReport)
        assert older[:6] == message[:6]
        assert older.workingset_refaults == protocol.UNKNOWN_U64
        return
    with pytest.raises(ProtocolError):
        decode(Frame(frame.type, frame.payload[:cut]))


@given(u8, st.binary(max_size=600))
def test_arbitrary_payloads_decode_or_are_refused(kind: int, payload: bytes) -> None:
    try:
        message = decode(Frame(kind, payload))
    except ProtocolError:
        return
    assert (message is None) == (kind not in set(MessageType))


@pytest.mark.parametrize(
    "message",
    [
        protocol.Exec(1, (b"x",) * (protocol.ARGUMENTS_MAX + 1), 0, b""),
        protocol.Exec(1, (b"x" * (protocol.ARGUMENT_BYTES_MAX + 1),), 0, b""),
        protocol.Exec(1, (b"x",), 0, bytes(protocol.STDIN_BYTES_MAX + 1)),
        protocol.Exec(1, (b"x" * 100_000,) * 3, 0, b""),
        protocol.ExecOutput(1, 1, bytes(protocol.OUTPUT_BYTES_MAX + 1)),
        protocol.Confirm(1, b"short", 0),
        protocol.Attach(1 << 64, 0),
    ],
    ids=["arguments", "argument", "stdin", "payload", "output", "epoch", "number"],
)
def test_what_is_beyond_a_bound_is_not_sent(message: Message) -> None:
    with pytest.raises(ValueError, match=r"bound|fit|16 bytes"):
        encode(message)


def test_claimed_sizes_are_not_believed() -> None:
    piece = protocol.ScanPiece(1, 0, 0, 1, b"")
    payload = encode(piece)[20:]
    with pytest.raises(ProtocolError, match="claims"):
        decode(Frame(MessageType.SCAN_PIECE, payload[:-4] + (0xFFFFFFF0).to_bytes(4, "big")))
    for claimed in (0, protocol.PIECE_PAGES_MAX + 1):
        (frame,) = FrameDecoder().feed(encode(piece._replace(pages=claimed)))
        with pytest.raises(ProtocolError, match="pages"):
            decode(frame)


def test_long_text_is_shortened_between_characters() -> None:
    (frame,) = FrameDecoder().feed(encode(protocol.Error(1, 2, "x" + "ü" * 300)))
    message = decode(frame)
    assert isinstance(message, protocol.Error)
    assert message.text == "x" + "ü" * 127


@given(st.binary(min_size=1, max_size=5000))
def test_maps_round_trip(raw: bytes) -> None:
    assert unpack_map(pack_map(raw), len(raw)) == raw
    for wrong in (len(raw) - 1, len(raw) + 1):
        with pytest.raises(ProtocolError):
            unpack_map(pack_map(raw), wrong)


@given(st.binary(max_size=200), st.integers(1, 5000))
def test_arbitrary_maps_inflate_or_are_refused(data: bytes, size: int) -> None:
    with contextlib.suppress(ProtocolError):
        assert len(unpack_map(data, size)) == size


def test_a_map_that_inflates_without_end_is_not_followed() -> None:
    bomb = zlib.compress(bytes(64 << 20), 9)
    tracemalloc.start()
    try:
        with pytest.raises(ProtocolError):
            unpack_map(bomb, protocol.PIECE_PAGES_MAX)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_a_map_with_something_behind_it_is_refused() -> None:
    with pytest.raises(ProtocolError):
        unpack_map(pack_map(b"abc") + b"more", 3)


def hello(**changes: Any) -> Hello:
    base = Hello(0, 0, 1, bytes(16), 4096, ((0, 5),), "6.1", "0.1", Fact.OFF, Fact.OFF, Fact.ON, Fact.OFF, ())
    return base._replace(**changes)


def test_what_hello_means() -> None:
    assert not hello().exec_allowed and hello(features=Feature.EXEC).exec_allowed
    assert not hello().checks_free_pages
    assert hello(page_poison=Fact.ON).checks_free_pages
    assert hello(page_poison=Fact.UNKNOWN).checks_free_pages
    assert hello(debug_pagealloc=Fact.ON).checks_free_pages
    assert not hello(debug_pagealloc=Fact.UNKNOWN).checks_free_pages
