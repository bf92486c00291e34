"""Frames survive garbage, corruption and truncation; hostile bytes cost neither memory nor time."""

from __future__ import annotations

import itertools
import time
import zlib

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from hvaqemu.framing import HEADER_SIZE, MAGIC, PAYLOAD_MAX, Frame, FrameDecoder, encode_frame

frames = st.builds(Frame, st.integers(0, 255), st.binary(max_size=300))
garbage = st.one_of(
    st.binary(max_size=80),
    st.sampled_from([MAGIC, MAGIC[:3], MAGIC * 3, encode_frame(1, b"x" * 40)[:-41], b"\x89" * 5]),
)


def in_pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    edges = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return [data[start:stop] for start, stop in itertools.pairwise(edges)]


@given(st.lists(st.tuples(garbage, frames), max_size=6), garbage, st.lists(st.integers(0, 10_000), max_size=8))
def test_every_frame_between_garbage_is_found(parts: list[tuple[bytes, Frame]], tail: bytes, cuts: list[int]) -> None:
    stream = b"".join(noise + encode_frame(*frame) for noise, frame in parts) + tail
    decoder = FrameDecoder()
    found = [frame for piece in in_pieces(stream, cuts) for frame in decoder.feed(piece)]
    assert found == [frame for _, frame in parts]
    noise = sum(len(noise) for noise, _ in parts) + len(tail)
    assert decoder.dropped_bytes + decoder.buffered == noise


@given(st.lists(frames, min_size=3, max_size=3), st.integers(0, 10_000), st.integers(1, 255))
def test_a_corrupt_byte_costs_its_own_frame_only(sent: list[Frame], where: int, flip: int) -> None:
    middle = bytearray(encode_frame(*sent[1]))
    middle[where % len(middle)] ^= flip
    decoder = FrameDecoder()
    found = decoder.feed(encode_frame(*sent[0]) + bytes(middle) + encode_frame(*sent[2]))
    assert found == [sent[0], sent[2]]


@given(frames, frames, st.integers(0, 10_000))
def test_what_follows_a_truncated_frame_is_found_after_giving_up(first: Frame, second: Frame, cut: int) -> None:
    whole = encode_frame(*first)
    torn = whole[: cut % len(whole)]
    # Else the first frame is on the wire as it was sent, whoever sent its end.
    assume(not (torn + encode_frame(*second)).startswith(whole))
    decoder = FrameDecoder()
    found = decoder.feed(torn + encode_frame(*second))
    if not found:
        assert decoder.buffered
        found = decoder.give_up()
    assert found == [second]
    assert decoder.dropped_bytes == len(torn)


@given(st.lists(st.binary(max_size=2000), max_size=20))
def test_arbitrary_bytes_are_accounted_for(pieces: list[bytes]) -> None:
    decoder = FrameDecoder()
    for piece in pieces:
        decoder.feed(piece)
        decoder.give_up()
    assert decoder.dropped_bytes + decoder.buffered == sum(map(len, pieces))


def test_one_byte_at_a_time() -> None:
    sent = [Frame(7, bytes(range(256))), Frame(8, b"")]
    decoder = FrameDecoder()
    found = [
        frame for byte in b"".join(encode_frame(*frame) for frame in sent) for frame in decoder.feed(bytes([byte]))
    ]
    assert found == sent and decoder.buffered == 0


def header(length: int, payload_crc: int = 0, version: int = 1) -> bytes:
    covered = MAGIC + bytes([version, 1, 0, 0]) + length.to_bytes(4, "big") + payload_crc.to_bytes(4, "big")
    return covered + zlib.crc32(covered).to_bytes(4, "big")


def test_a_length_beyond_the_bound_is_not_waited_for() -> None:
    decoder = FrameDecoder()
    assert decoder.feed(header(PAYLOAD_MAX + 1) + encode_frame(2, b"after")) == [Frame(2, b"after")]


def test_frames_of_another_version_are_stepped_over() -> None:
    payload = encode_frame(9, b"not for us")
    decoder = FrameDecoder()
    foreign = header(len(payload), zlib.crc32(payload), version=2) + payload
    assert decoder.feed(foreign + encode_frame(2, b"after")) == [Frame(2, b"after")]
    assert decoder.foreign_frames == 1


@pytest.mark.parametrize(
    "unit",
    [header(PAYLOAD_MAX), MAGIC, MAGIC[:1], header(PAYLOAD_MAX // 2) + b"\x00" * 44],
    ids=["nested headers", "magics", "first bytes", "spread headers"],
)
def test_hostile_bytes_cost_linear_time_and_bounded_memory(unit: bytes) -> None:
    """Looking again inside each of these frames would check 10^11 bytes."""
    data = unit * ((8 << 20) // len(unit))
    decoder = FrameDecoder()
    begun = time.process_time()
    for start in range(0, len(data), 1 << 20):
        assert decoder.feed(data[start : start + (1 << 20)]) == []
        assert decoder.buffered <= PAYLOAD_MAX + HEADER_SIZE
    assert time.process_time() - begun < 8
    # Garbage that promised a payload delays what follows by that payload at most.
    after = encode_frame(3, b"alive")
    assert any(decoder.feed(after) for _ in range(2 * PAYLOAD_MAX // len(after)))


def test_a_payload_beyond_the_bound_is_not_encoded() -> None:
    with pytest.raises(ValueError, match="bound"):
        encode_frame(1, bytes(PAYLOAD_MAX + 1))
