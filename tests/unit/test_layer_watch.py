"""Layers that others open, alter, replace and lose: real files, real writers in processes of their own."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from hva_host.agent import layer_watch
from hva_host.agent.layer_watch import LayerWatch, content_of, refuse_writers
from hva_host.agent.leases import Lease, LeaseState, writers
from hva_host.memory.index import build_index
from hvaqemu.errors import HostError, RefusedError

_BLOCKS = 64
_SECONDS = 60.0
_WRITER = """
import mmap, os, sys
fd = os.open(sys.argv[1], os.O_RDWR)
if sys.argv[2] == "mapped":
    kept = mmap.mmap(fd, 4096)
    os.closerange(3, 256)
print("open", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "golden.raw"
    path.write_bytes(os.urandom(_BLOCKS * 4096))
    build_index(path, tmp_path / "golden.idx")
    return path


@contextmanager
def writer(path: Path, how: str = "open") -> Iterator[int]:
    """A process that has ``path`` open for writing; its pid."""
    with subprocess.Popen(
        [sys.executable, "-c", _WRITER, str(path), how], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"open\n"
        yield process.pid


@asynccontextmanager
async def writing(path: Path) -> AsyncIterator[int]:
    """The same beside an event loop, which must hear of it before the writer is let in."""
    opened = writer(path)
    pid = await asyncio.to_thread(opened.__enter__)
    try:
        yield pid
    finally:
        await asyncio.to_thread(opened.__exit__, None, None, None)


async def write(path: Path, data: bytes, offset: int = 0) -> None:
    """Write into a file that is there. In a thread: whoever opens it waits until the event loop has heard of it."""

    def work() -> None:
        with path.open("r+b") as file:
            file.seek(offset)
            file.write(data)

    await asyncio.to_thread(work)


class Watched:
    def __init__(self, image: Path) -> None:
        self.image = image
        self.told: list[tuple[str, dict[str, Any]]] = []
        content = content_of(image, image.with_suffix(".idx"))
        self.watch = LayerWatch([(image, content)], lambda name, data: self.told.append((name, data)))

    async def until(self, pattern: str) -> str:
        """Wait until the reason is this one."""
        deadline = time.monotonic() + _SECONDS
        while not re.search(pattern, self.watch.reason):
            assert time.monotonic() < deadline, f"{pattern!r}: {self.watch.reason!r}, {self.told}"
            await asyncio.sleep(0.02)
        return self.watch.reason

    async def told_of(self, count: int) -> None:
        """Wait for so many events."""
        async with asyncio.timeout(_SECONDS):
            while len(self.told) < count:  # noqa: ASYNC110
                await asyncio.sleep(0.02)

    async def trusted(self) -> None:
        await self.until("^$")
        assert self.told[-1][0] == "LAYER_TRUSTED"


@pytest.fixture
async def watched(image: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Watched]:
    monkeypatch.setattr(layer_watch, "LOOK_SECONDS", 0.2)
    found = Watched(image)
    found.watch.start()
    assert found.watch.reason == ""
    try:
        yield found
    finally:
        await found.watch.close()


@pytest.mark.parametrize("how", ["open", "mapped"])
def test_a_writer_at_launch_is_named(image: Path, how: str) -> None:
    refuse_writers(image)
    with writer(image, how) as pid, pytest.raises(RefusedError) as refused:
        refuse_writers(image)
    # A mapping alone has no descriptor in /proc to tell of it; the kernel knows all the same.
    who = f"process {pid} (python" if how == "open" else "somebody"
    assert refused.value.message.startswith(f"image {image}: {who}")
    assert refused.value.message.endswith("has it open for writing")
    refuse_writers(image)


def test_readers_are_no_writers(image: Path) -> None:
    with image.open("rb"):
        refuse_writers(image)
        assert writers(image.stat()) == []


def test_an_image_changed_since_it_was_indexed(image: Path) -> None:
    os.truncate(image, 4096)
    with pytest.raises(HostError, match="changed while it was indexed"):
        content_of(image, image.with_suffix(".idx"))


async def test_a_writer_is_noticed_at_once_and_does_not_wait(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The lease alone must tell: nobody looks in time.
    monkeypatch.setattr(layer_watch, "LOOK_SECONDS", 3600.0)
    watched = Watched(image)
    watched.watch.start()
    try:
        began = time.monotonic()
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", _WRITER, str(image), "open", stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert process.stdout is not None
        assert process.stdin is not None
        async with asyncio.timeout(_SECONDS):
            assert await process.stdout.readline() == b"open\n"
        # Far from the 45 s after which the kernel would take the lease.
        assert time.monotonic() - began < 5
        assert "open for writing" in watched.watch.reason
        assert await watched.until(f"process {process.pid} ")
        process.stdin.close()
        await process.wait()
        watched.watch.look()
        assert watched.watch.reason == ""
        assert {name for name, _ in watched.told[:-1]} == {"LAYER_WRITER"}
        assert watched.told[-1][0] == "LAYER_TRUSTED"
        assert watched.told[0][1]["layer"] == str(image)
    finally:
        await watched.watch.close()


async def test_altered_in_place_and_put_right(watched: Watched) -> None:
    image = watched.image
    right = image.read_bytes()
    await write(image, b"x", 5 * 4096)
    # A lease that is broken tells at once; comparing takes its time.
    await watched.until("does not hold what was indexed any more")
    assert any(name == "LAYER_CHANGED" for name, _ in watched.told)
    await write(image, right)
    await watched.trusted()
    # The lease is back, too.
    async with writing(image) as pid:
        await watched.until(f"process {pid} ")
    await watched.trusted()


async def test_a_time_set_back_deceives_nobody(watched: Watched) -> None:
    status = watched.image.stat()
    await write(watched.image, b"x")
    os.utime(watched.image, ns=(status.st_atime_ns, status.st_mtime_ns))
    await watched.until("does not hold")


async def test_truncated_and_put_right(watched: Watched) -> None:
    right = watched.image.read_bytes()
    await asyncio.to_thread(os.truncate, watched.image, 8192)
    await watched.until(r"was 256\.0 KiB long and is 8\.0 KiB")
    await write(watched.image, right)
    await watched.trusted()


async def test_unlinked_and_replaced(watched: Watched, tmp_path: Path) -> None:
    right = watched.image.read_bytes()
    aside = watched.image.rename(tmp_path / "aside")
    await watched.until("No such file")
    watched.image.write_bytes(right[:-1] + bytes([right[-1] ^ 1]))
    await watched.until("does not hold")
    # Another file with the right bytes will do.
    watched.image.unlink()
    watched.image.write_bytes(right)
    await watched.trusted()
    async with writing(watched.image) as pid:
        await watched.until(f"process {pid} ")
    await watched.trusted()
    aside.replace(watched.image)
    await watched.trusted()


async def test_a_fifo_or_folder_in_its_place(watched: Watched) -> None:
    right = watched.image.read_bytes()
    watched.image.unlink()
    os.mkfifo(watched.image)
    await watched.until(r"is 0 B")
    watched.image.unlink()
    watched.image.mkdir()
    await watched.until("was .* long and is|does not hold|can not be")
    watched.image.rmdir()
    watched.image.write_bytes(right)
    await watched.trusted()


async def test_other_permissions_are_no_other_content(watched: Watched) -> None:
    watched.image.chmod(0o444)
    await watched.told_of(2)
    os.link(watched.image, watched.image.with_suffix(".link"))
    await watched.told_of(4)
    assert [name for name, _ in watched.told] == ["LAYER_CHANGED", "LAYER_TRUSTED"] * 2


@pytest.fixture
def no_leases(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a file system that has none: what the kernel's call answers there is answered here."""
    monkeypatch.setattr(Lease, "renew", lambda lease: LeaseState.NONE)


async def test_without_leases_proc_shows_writers(no_leases: None, watched: Watched) -> None:
    with writer(watched.image) as pid:
        await watched.until(f"process {pid} ")
        with pytest.raises(RefusedError, match=f"process {pid} "):
            refuse_writers(watched.image)
    await watched.trusted()
    await write(watched.image, b"x")
    await watched.until("does not hold")


async def test_what_changed_while_nobody_watched(image: Path) -> None:
    content = content_of(image, image.with_suffix(".idx"))
    with image.open("r+b") as file:
        file.write(b"x")
    told: list[str] = []
    watch = LayerWatch([(image, content)], lambda name, _data: told.append(name))
    watch.start()
    try:
        assert "compared" in watch.reason
        assert told == ["LAYER_CHANGED"]
    finally:
        await watch.close()


async def test_closing_gives_the_lease_up(image: Path) -> None:
    watched = Watched(image)
    watched.watch.start()
    await watched.watch.close()
    # Nobody is there to give it up: it is gone.
    with writer(image):
        pass
    assert watched.told == []
