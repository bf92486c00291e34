"""GuestLink against the real guest agent in a process of its own, and against guests that lie.

Between them stands what QEMU would be: a listening unix socket whose one client talks to a serial line.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import sys
import time
import tty
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import numpy as np
import pytest

from hva_host.agent.guest_exchange import PingExchange
from hva_host.agent.guest_link import GuestLink
from hva_host.agent.guest_requests import REQUESTS_MAX
from hva_host.agent.guest_session import LinkState
from hvaqemu import protocol
from hvaqemu.errors import ConfigError, DeadlineExceeded, GuestError, PeerLost, ProtocolError, RefusedError
from hvaqemu.framing import Frame, FrameDecoder, encode_frame
from hvaqemu.pages import PageAttribute, PageState, Run
from hvaqemu.protocol import Message, decode, encode, pack_map

ROOT = Path(__file__).parents[2]
PAGES = 40_000
#: Words of /proc/kpageflags and what they mean: free, clean file, the same referenced, clean swap, dirty, mlocked.
WORDS = {
    1 << 10: PageState.UNUSED,
    1 << 5 | 1 << 3: PageState.VOLATILE,
    1 << 5 | 1 << 3 | 1 << 2: PageState.VOLATILE | PageAttribute.REFERENCED,
    1 << 5 | 1 << 3 | 1 << 12 | 1 << 13 | 1 << 14: PageState.VOLATILE | PageAttribute.SWAPCACHE,
    1 << 5 | 1 << 3 | 1 << 4: PageState.STABLE,
    1 << 5 | 1 << 3 | 1 << 33: PageState.STABLE,
}
EPOCH = bytes(range(16))


class Serial:
    """QEMU's chardev and the guest's serial port: a unix socket for one client, a pty for the agent."""

    def __init__(self, directory: Path) -> None:
        self.socket = directory / "agent.sock"
        self.agents: list[asyncio.subprocess.Process] = []
        self._directory = directory
        # The slave stays open, as a port keeps existing when an agent dies.
        self._master, self._slave = os.openpty()
        tty.setraw(self._slave)
        os.set_blocking(self._master, False)
        self._client: asyncio.StreamWriter | None = None
        self.set_words(random.Random(1))

    def set_words(self, chance: random.Random, words: dict[int, int] = WORDS) -> np.ndarray:
        """Other page flags for the guest; what its pages are now."""
        chosen = chance.choices(list(words), k=PAGES)
        file = self._directory / "kpageflags"
        # In place: the agent keeps the file open, as it does the kernel's.
        with file.open("r+b" if file.exists() else "wb") as out:
            out.write(np.array(chosen, dtype=np.uint64).tobytes())
        return np.array([words[word] for word in chosen], dtype=np.uint8)

    async def __aenter__(self) -> Serial:
        (self._directory / "iomem").write_text(f"00000000-{PAGES * 4096 - 1:08x} : System RAM\n")
        self._server = await asyncio.start_unix_server(self._connected, self.socket)
        asyncio.get_running_loop().add_reader(self._master, self._from_guest)
        return self

    async def __aexit__(self, *_: object) -> None:
        for agent in self.agents:
            with contextlib.suppress(ProcessLookupError):
                agent.kill()
            await agent.wait()
        asyncio.get_running_loop().remove_reader(self._master)
        self._server.close()
        self.hang_up()
        os.close(self._master)
        os.close(self._slave)

    async def start_agent(self, *options: str) -> asyncio.subprocess.Process:
        agent = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "hva_guest", "--device", os.ttyname(self._slave), *options),
            *("--kpageflags", str(self._directory / "kpageflags"), "--iomem", str(self._directory / "iomem")),
            env={"PYTHONPATH": f"{ROOT}:{ROOT / 'guest-agent'}"},
            stderr=asyncio.subprocess.DEVNULL,
        )
        self.agents.append(agent)
        return agent

    def hang_up(self) -> None:
        if self._client is not None:
            self._client.transport.abort()
            self._client = None

    def inject(self, data: bytes) -> None:
        """Bytes the host reads as if the guest had written them."""
        assert self._client is not None
        self._client.write(data)

    def _from_guest(self) -> None:
        with contextlib.suppress(BlockingIOError):
            data = os.read(self._master, 65536)
            if self._client is not None:
                self._client.write(data)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._client = writer
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(4096):
                while data:
                    with contextlib.suppress(BlockingIOError):
                        data = data[os.write(self._master, data) :]
                    if data:
                        await asyncio.sleep(0.005)


@pytest.fixture
async def serial(tmp_path: Path) -> AsyncIterator[Serial]:
    async with Serial(tmp_path) as serial:
        yield serial


@pytest.fixture
async def link(serial: Serial) -> AsyncIterator[GuestLink]:
    async with GuestLink(serial.socket, pages=PAGES) as link:
        yield link


# With the real agent


async def test_scans_and_confirms_say_what_the_kernel_says(serial: Serial, link: GuestLink) -> None:
    expected = serial.set_words(random.Random(2))
    await serial.start_agent()
    hello = await link.wait_connected(10)
    assert link.connected and link.hello == hello
    assert hello.ranges == ((0, PAGES),) and hello.page_size == 4096 and not hello.exec_allowed

    report = await link.scan(10)
    assert (report.classes == expected).all() and report.classes.dtype == np.uint8
    assert report.totals == {state: int((expected & 15 == state).sum()) for state in PageState}
    assert 0 < report.memory_free_bytes <= report.memory_total_bytes

    for round in (1, 2):
        expected = serial.set_words(random.Random(round))
        free = await link.confirm(EPOCH, round, Run(0, PAGES), 10)
        assert free.dtype == np.bool_
        assert (free == (expected == PageState.UNUSED)).all(), "each round scans anew"
    for part in (Run(0, 1), Run(30_000, 5_000), Run(PAGES - 3, 3)):
        free = await link.confirm(EPOCH, 1, part, 10)
        assert free.shape == (part.pages,)
        assert (free == (expected == PageState.UNUSED)[part.start : part.stop]).all()

    stats = await link.stats(10)
    assert stats.memory_total_bytes == report.memory_total_bytes and stats.uptime_seconds > 0
    assert await link.ping(10) < 10
    with pytest.raises(RefusedError, match="allow_exec"):
        await link.execute(["true"], 10)


async def test_both_ends_may_come_in_any_order(serial: Serial) -> None:
    await serial.start_agent()
    await asyncio.sleep(0.5)
    async with GuestLink(serial.socket, pages=PAGES) as link:
        await link.wait_connected(10)
    async with GuestLink(serial.socket, pages=PAGES) as link:
        await link.wait_connected(10)
        await link.scan(10)


async def test_commands(serial: Serial, link: GuestLink) -> None:
    await serial.start_agent("--allow-exec")
    await link.wait_connected(10)
    result = await link.execute(["sh", "-c", "cat; echo oops >&2; exit 3"], 10, stdin=b"x" * 60_000)
    assert (result.exit_status, result.stdout, result.stderr) == (3, b"x" * 60_000, b"oops\n")
    assert not result.ok and not result.truncated

    result = await link.execute(["sh", "-c", "kill -TERM $$"], 10)
    assert (result.exit_status, result.signal) == (None, signal.SIGTERM)
    result = await link.execute(["sh", "-c", "echo $HOME; pwd; env | grep BYTECODE"], 10)
    assert result.stdout == b"/root\n/\nPYTHONDONTWRITEBYTECODE=1\n"
    with pytest.raises(GuestError, match="no-such-program: could not be started in the guest: No such file"):
        await link.execute(["no-such-program"], 10)
    with pytest.raises(GuestError, match="null byte"):
        await link.execute(["echo", "a\0b"], 10)
    with pytest.raises(ConfigError, match="bound"):
        await link.execute(["echo"], 10, stdin=bytes(100_000))
    with pytest.raises(ConfigError, match="no command"):
        await link.execute([], 10)


async def test_a_command_that_overruns_dies_with_its_children(serial: Serial, link: GuestLink) -> None:
    await serial.start_agent("--allow-exec")
    await link.wait_connected(10)
    begun = time.monotonic()
    result = await link.execute(["sh", "-c", "sleep 60 & echo $!; wait"], 0.3)
    assert result.timed_out and result.signal == signal.SIGKILL and not result.ok
    assert time.monotonic() - begun < 5
    await gone(int(result.stdout))


async def eventually(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110  (another process brings it about)
            await asyncio.sleep(0.02)


async def gone(pid: int) -> None:
    """Wait until ``pid`` has ended (a zombie has)."""
    stat = Path(f"/proc/{pid}/stat")

    def ended() -> bool:
        try:
            return stat.read_text().rpartition(")")[2].split()[0] == "Z"
        except (FileNotFoundError, ProcessLookupError):
            return True

    await eventually(ended)


async def test_what_a_command_leaves_in_the_background_lives_on(serial: Serial, link: GuestLink) -> None:
    await serial.start_agent("--allow-exec")
    await link.wait_connected(10)
    result = await link.execute(["sh", "-c", "sleep 30 & echo $!"], 20)
    assert result.exit_status == 0
    os.kill(int(result.stdout), signal.SIGKILL)


async def test_scans_and_commands_go_on_beside_a_flood_of_output(serial: Serial, link: GuestLink) -> None:
    await serial.start_agent("--allow-exec")
    await link.wait_connected(10)
    flood = asyncio.create_task(link.execute(["sh", "-c", "yes | head -c 6000000"], 30, limit=1000))
    await link.scan(10)
    assert (await link.execute(["echo", "beside"], 10)).stdout == b"beside\n"
    result = await flood
    assert result.ok and result.truncated and result.stdout == b"y\n" * 500


async def test_a_cancelled_call_kills_the_command(serial: Serial, link: GuestLink, tmp_path: Path) -> None:
    await serial.start_agent("--allow-exec")
    await link.wait_connected(10)
    marker = tmp_path / "pid"
    call = asyncio.create_task(link.execute(["sh", "-c", f"echo $$ > {marker}; exec sleep 60"], 60))
    await eventually(lambda: marker.exists() and marker.read_text() != "")
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    await gone(int(marker.read_text()))


async def test_too_many_commands_are_refused(serial: Serial, link: GuestLink) -> None:
    await serial.start_agent("--allow-exec")
    await link.wait_connected(10)
    calls = [asyncio.create_task(link.execute(["sleep", "60"], 60)) for _ in range(8)]
    await link.ping(10)
    with pytest.raises(GuestError, match="8 commands"):
        await link.execute(["true"], 10)
    for call in calls:
        call.cancel()
    await asyncio.gather(*calls, return_exceptions=True)


async def test_a_killed_agent_fails_requests_and_its_successor_serves(serial: Serial, link: GuestLink) -> None:
    first = await serial.start_agent("--allow-exec")
    before = await link.wait_connected(10)
    call = asyncio.create_task(link.execute(["sleep", "1"], 60))
    await link.ping(10)
    first.kill()
    await first.wait()
    await serial.start_agent("--allow-exec")
    with pytest.raises(PeerLost, match="restarted"):
        await asyncio.wait_for(call, 10)
    after = await link.wait_connected(10)
    assert after.instance != before.instance
    await link.scan(10)


async def test_an_agent_killed_within_a_frame_does_not_swallow_its_successor(serial: Serial, link: GuestLink) -> None:
    await serial.start_agent()
    await link.wait_connected(10)
    serial.inject(encode_frame(0x11, bytes(100_000))[:500])
    with pytest.raises(DeadlineExceeded):
        await link.ping(0.2)
    await asyncio.sleep(1.5)
    assert await link.ping(5) < 5
    assert link.dropped_bytes == 500


async def test_a_silent_agent_costs_a_deadline(serial: Serial, link: GuestLink) -> None:
    agent = await serial.start_agent()
    await link.wait_connected(10)
    agent.send_signal(signal.SIGSTOP)
    begun = time.monotonic()
    with pytest.raises(DeadlineExceeded, match=r"did not answer within 0\.3 s"):
        await link.confirm(EPOCH, 1, Run(0, PAGES), 0.3)
    with pytest.raises(DeadlineExceeded):
        await link.scan(0.2)
    assert time.monotonic() - begun < 3
    agent.send_signal(signal.SIGCONT)
    await link.scan(10)
    assert link.counters.unsolicited >= 2, "late answers count for nothing"


async def test_the_link_comes_back_when_qemu_drops_the_connection(serial: Serial, link: GuestLink) -> None:
    await serial.start_agent("--allow-exec")
    await link.wait_connected(10)
    call = asyncio.create_task(link.execute(["sleep", "60"], 60))
    await link.ping(10)
    serial.hang_up()
    with pytest.raises(PeerLost, match="QEMU closed"):
        await asyncio.wait_for(call, 10)
    await link.wait_connected(10)
    await link.scan(10)


async def test_page_flags_that_cannot_be_read_are_named(serial: Serial, link: GuestLink, tmp_path: Path) -> None:
    (tmp_path / "kpageflags").unlink()
    await serial.start_agent()
    await link.wait_connected(10)
    with pytest.raises(GuestError, match="kpageflags: No such file"):
        await link.scan(10)


async def test_garbage_and_nonsense_do_not_end_the_agent(serial: Serial, link: GuestLink) -> None:
    agent = await serial.start_agent()
    await link.wait_connected(10)
    assert link._channel is not None
    chance = random.Random(3)
    for kind in set(range(256)) - {protocol.MessageType.ATTACH}:
        link._channel.tell(encode_frame(kind, chance.randbytes(chance.randrange(60))) + chance.randbytes(30))
    link._channel.tell(encode(protocol.Ack(0xFFFFFFFF)) + encode(protocol.Exec(5, (), 0, b"")))
    await link.wait_connected(10)
    assert (await link.scan(10)).totals[PageState.UNUSED] > 0
    assert agent.returncode is None


# Without an agent


async def test_nobody_there(tmp_path: Path) -> None:
    states: list[LinkState] = []
    async with GuestLink(tmp_path / "none", pages=PAGES, on_change=states.append) as link:
        with pytest.raises(DeadlineExceeded, match="socket could not be reached"):
            await link.wait_connected(0.2)
        with pytest.raises(PeerLost, match="not connected"):
            await link.scan(1)
        waiter = asyncio.create_task(link.wait_connected(30))
        await asyncio.sleep(0.05)
    with pytest.raises(PeerLost, match="closed"):
        await waiter
    assert states == [LinkState.CONNECTING, LinkState.CLOSED]


async def test_a_guest_without_an_agent(serial: Serial, link: GuestLink) -> None:
    with pytest.raises(DeadlineExceeded, match="did not answer"):
        await link.wait_connected(0.5)


# With a guest that lies


class Liar:
    """A guest under test control: answers each request with what ``answer`` makes of it."""

    def __init__(self, path: Path, answer: Callable[[Message], list[bytes]]) -> None:
        self._path = path
        self._answer = answer
        self.hello = protocol.Hello(0, 7, 1, bytes(16), 4096, ((0, PAGES),), "6.1", "0.1", 1, 1, 1, 1, ())

    async def __aenter__(self) -> Liar:
        self._server = await asyncio.start_unix_server(self._serve, self._path)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        decoder = FrameDecoder()
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(4096):
                for frame in decoder.feed(data):
                    message = decode(frame)
                    if isinstance(message, protocol.Attach):
                        writer.write(encode(self.hello._replace(nonce=message.nonce)))
                    elif message is not None and not isinstance(message, protocol.Ack):
                        for answer in self._answer(message):
                            writer.write(answer)
                            await writer.drain()
        writer.transport.abort()


def piece(request: int, number: int, start: int, pages: int, data: bytes | None = None) -> bytes:
    return encode(protocol.ScanPiece(request, number, start, pages, pack_map(b"\1" * pages) if data is None else data))


def end(request: int, pieces: int) -> bytes:
    return encode(protocol.ScanEnd(request, pieces, *[1 << 63] * 8))


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
