"""GuestLink against guests that lie: what is out of bounds fails its request, and everything stays bounded."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from hva_host.agent.guest_exchange import PingExchange
from hva_host.agent.guest_link import GuestLink
from hva_host.agent.guest_requests import REQUESTS_MAX
from hva_host.agent.guest_session import LinkState
from hvaqemu import protocol
from hvaqemu.errors import DeadlineExceeded, GuestError, PeerLost, ProtocolError, RefusedError
from hvaqemu.framing import Frame, FrameDecoder, encode_frame
from hvaqemu.pages import PageState, Run
from hvaqemu.protocol import Message, decode, encode, pack_map
from tests.unit.guest_stand_ins import EPOCH, PAGES, Liar, end, piece

LIES: dict[str, tuple[Callable[[int], list[bytes]], str]] = {
    "a repeated piece": (lambda r: [piece(r, 0, 0, 8), piece(r, 0, 0, 8)], "piece 0 where 1"),
    "a missing piece": (lambda r: [piece(r, 1, 8, 8)], "piece 1 where 0"),
    "overlapping pieces": (lambda r: [piece(r, 0, 0, 8), piece(r, 1, 7, 8)], "pages 7 to 15"),
    "pages beyond the VM": (lambda r: [piece(r, 0, PAGES - 4, 8)], "are left"),
    "a pfn near the end of numbers": (lambda r: [piece(r, 0, (1 << 64) - 1, 8)], "are left"),
    "a short map": (lambda r: [piece(r, 0, 0, 9, pack_map(b"\1" * 8))], "not 9 bytes"),
    "a map without end": (lambda r: [piece(r, 0, 0, 9, pack_map(bytes(1 << 20)))], "not 9 bytes"),
    "no map": (lambda r: [piece(r, 0, 0, 9, b"junk")], "inflate"),
    "too few pieces": (lambda r: [piece(r, 0, 0, 8), end(r, 2)], "of 2 pieces the guest announced 1"),
}


@pytest.mark.parametrize("name", LIES)
async def test_an_answer_out_of_bounds_fails_its_request_only(tmp_path: Path, name: str) -> None:
    lie, complaint = LIES[name]

    def answer(message: Message) -> list[bytes]:
        if isinstance(message, protocol.Scan):
            return lie(message.request)
        return [encode(protocol.Pong(message.request))] if isinstance(message, protocol.Ping) else []

    async with Liar(tmp_path / "s", answer), GuestLink(tmp_path / "s", pages=PAGES) as link:
        await link.wait_connected(5)
        with pytest.raises(ProtocolError, match=complaint):
            await link.scan(5)
        assert link.counters.broken_answers == 1
        await link.ping(5)


async def test_unknown_states_are_stable_and_gaps_too(tmp_path: Path) -> None:
    def answer(message: Message) -> list[bytes]:
        assert isinstance(message, protocol.Scan)
        data = bytes([PageState.UNUSED, 4, 15, 0xF2, PageState.POTENTIAL])
        return [piece(message.request, 0, 10, 5, pack_map(data)), end(message.request, 1)]

    async with Liar(tmp_path / "s", answer), GuestLink(tmp_path / "s", pages=PAGES) as link:
        await link.wait_connected(5)
        report = await link.scan(5)
    assert list(report.classes[9:16]) == [0, 1, 0, 0, 0xF2, 3, 0]
    assert report.totals[PageState.STABLE] == PAGES - 3


async def test_late_repeated_and_foreign_confirms_count_for_nothing(tmp_path: Path) -> None:
    everything = pack_map(b"\xff" * (PAGES // 8))

    def confirmed(request: int, epoch: bytes, round: int, data: bytes) -> list[bytes]:
        whole = encode(protocol.ConfirmPiece(request, epoch, round, 0, 0, PAGES, data))
        return [whole, encode(protocol.ConfirmEnd(request, epoch, round, 1, 0))]

    def answer(message: Message) -> list[bytes]:
        assert isinstance(message, protocol.Confirm)
        foreign = [
            *confirmed(message.request, bytes(16), message.round, everything),
            *confirmed(message.request, message.epoch, message.round + 1, everything),
            *confirmed(message.request + 1, message.epoch, message.round, everything),
            *confirmed(message.request - 1, message.epoch, message.round, everything),
            piece(message.request, 0, 0, 8),
        ]
        nothing = confirmed(message.request, message.epoch, message.round, pack_map(bytes(PAGES // 8)))
        return [*foreign, *nothing, *nothing]

    async with Liar(tmp_path / "s", answer), GuestLink(tmp_path / "s", pages=PAGES) as link:
        await link.wait_connected(5)
        assert not (await link.confirm(EPOCH, 1, Run(0, PAGES), 5)).any()
        assert not (await link.confirm(EPOCH, 2, Run(0, PAGES), 5)).any()
        assert link.counters.unsolicited >= 9


async def test_a_flood_is_counted_and_dropped(tmp_path: Path) -> None:
    def answer(message: Message) -> list[bytes]:
        assert isinstance(message, protocol.Ping)
        noise = [
            encode_frame(0x77, bytes(1000)),
            encode_frame(protocol.MessageType.SCAN_PIECE, b"short"),
            piece(1, 0, 0, 8),
            encode(protocol.ExecOutput(message.request, 1, bytes(30_000))),
            b"\x89HVA" + bytes(5000),
        ]
        return noise * 300 + [encode(protocol.Pong(message.request))]

    async with Liar(tmp_path / "s", answer), GuestLink(tmp_path / "s", pages=PAGES) as link:
        await link.wait_connected(5)
        await link.ping(10)
        assert (link.counters.unknown, link.counters.malformed, link.counters.unsolicited) == (300, 300, 600)
        assert link.dropped_bytes == 300 * 5004


async def test_an_error_s_text_cannot_speak_to_the_terminal(tmp_path: Path) -> None:
    def answer(message: Message) -> list[bytes]:
        assert isinstance(message, (protocol.Scan, protocol.Stats))
        return [encode(protocol.Error(message.request, 4, "\x1b[2Jgone\n\u202e"))]

    async with Liar(tmp_path / "s", answer), GuestLink(tmp_path / "s", pages=PAGES) as link:
        await link.wait_connected(5)
        with pytest.raises(GuestError) as caught:
            await link.stats(5)
        assert str(caught.value) == "the guest agent: \\x1b[2Jgone\\n\\u202e"


async def test_a_guest_that_drops_the_session_gets_a_new_one(tmp_path: Path) -> None:
    refusals = 1

    def answer(message: Message) -> list[bytes]:
        nonlocal refusals
        assert isinstance(message, protocol.Ping)
        if refusals:
            refusals -= 1
            return [encode(protocol.Error(message.request, protocol.ErrorCode.NOT_ATTACHED, ""))]
        return [encode(protocol.Pong(message.request))]

    async with Liar(tmp_path / "s", answer), GuestLink(tmp_path / "s", pages=PAGES) as link:
        await link.wait_connected(5)
        with pytest.raises(PeerLost, match="dropped the session"):
            await link.ping(5)
        await link.wait_connected(5)
        await link.ping(5)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"page_size": 65536}, "pages of 65536 bytes"),
        ({"ranges": ((0, PAGES + 1),)}, "claims memory up to"),
        ({"ranges": ((10, 10), (5, 5))}, "do not ascend"),
        ({"ranges": ((1 << 63, 1 << 63),)}, "claims memory up to"),
    ],
)
async def test_an_agent_we_cannot_work_with_is_refused(
    tmp_path: Path, changes: dict[str, object], complaint: str
) -> None:
    async with Liar(tmp_path / "s", lambda _: []) as liar, GuestLink(tmp_path / "s", pages=PAGES) as link:
        liar.hello = liar.hello._replace(**changes)  # type: ignore[arg-type]
        with pytest.raises(RefusedError, match=complaint):
            await link.wait_connected(5)
        assert link.state is LinkState.REFUSED and link.hello is None
        with pytest.raises(PeerLost, match=complaint):
            await link.scan(1)


async def test_requests_are_bounded(tmp_path: Path) -> None:
    async with Liar(tmp_path / "s", lambda _: []), GuestLink(tmp_path / "s", pages=PAGES) as link:
        await link.wait_connected(5)
        calls = [asyncio.create_task(link.ping(1)) for _ in range(REQUESTS_MAX)]
        await asyncio.sleep(0)
        with pytest.raises(RefusedError, match="under way"):
            await link.ping(1)
        results = await asyncio.gather(*calls, return_exceptions=True)
    assert all(isinstance(result, DeadlineExceeded) for result in results)


async def test_a_guest_that_reads_nothing_does_not_block_us(tmp_path: Path) -> None:
    """Once the socket is full, requests end by their deadlines and what waits in our process stays bounded."""
    deaf = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        (frame,) = FrameDecoder().feed(await reader.read(4096))
        attach = decode(Frame(*frame))
        assert isinstance(attach, protocol.Attach)
        hello = protocol.Hello(attach.nonce, 7, 1, bytes(16), 4096, (), "", "", 1, 1, 1, 1, ())
        writer.write(encode(hello))
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        await deaf.wait()
        writer.transport.abort()

    server = await asyncio.start_unix_server(serve, tmp_path / "s")
    async with GuestLink(tmp_path / "s", pages=PAGES) as link:
        await link.wait_connected(5)
        for _ in range(12):
            with pytest.raises(DeadlineExceeded):
                await link._ask(
                    lambda number: protocol.Exec(number, (b"x",), 0, bytes(60_000)),
                    PingExchange(),
                    0.05,
                )
        assert link._channel is not None
        assert link._channel.unwritten < 300_000
    deaf.set()
    server.close()
