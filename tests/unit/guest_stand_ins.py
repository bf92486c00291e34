"""What guest links are tested against: the real guest agent behind a serial line, and a guest under test control."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import sys
import tty
from collections.abc import Callable
from pathlib import Path

import numpy as np

from hvaqemu import protocol
from hvaqemu.framing import FrameDecoder
from hvaqemu.pages import PageAttribute, PageState
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


async def eventually(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110  (another process brings it about)
            await asyncio.sleep(0.02)


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
