"""Racing a peer's death and a deadline; logs for terminals; sockets below long paths."""

from __future__ import annotations

import asyncio
import socket
import stat
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvaqemu.errors import DeadlineExceeded, HostError, PeerLost
from hvaqemu.qemu import logs, sockets
from hvaqemu.qemu.race import race


class Work:
    """Waits for ever and knows whether it was cancelled."""

    cancelled = False

    async def __call__(self) -> None:
        try:
            await asyncio.get_running_loop().create_future()
        except asyncio.CancelledError:
            self.cancelled = True
            raise


async def test_race_is_won() -> None:
    async def work() -> int:
        return 5

    assert await race(work(), 1.0, "work", asyncio.get_running_loop().create_future()) == 5


async def test_race_is_won_even_by_a_peer_that_died_after_answering() -> None:
    gone = asyncio.get_running_loop().create_future()
    gone.set_result("died")

    async def work() -> int:
        return 5

    assert await race(work(), 1.0, "work", gone) == 5


async def test_peer_dies() -> None:
    gone = asyncio.get_running_loop().create_future()
    asyncio.get_running_loop().call_later(0.02, gone.set_result, "it died of age")
    work = Work()
    began = time.monotonic()
    with pytest.raises(PeerLost, match="asking: it died of age"):
        await race(work(), 30.0, "asking", asyncio.get_running_loop().create_future(), gone)
    assert time.monotonic() - began < 5
    assert work.cancelled


async def test_deadline() -> None:
    work = Work()
    with pytest.raises(DeadlineExceeded, match=r"asking: no answer within 20\.0 ms"):
        await race(work(), 0.02, "asking", asyncio.get_running_loop().create_future())
    assert work.cancelled


async def test_cancelling_the_race_cancels_the_work() -> None:
    work = Work()
    task = asyncio.create_task(race(work(), 30.0, "asking"))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert work.cancelled


async def test_error_of_the_work_is_its_own() -> None:
    async def work() -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError):
        await race(work(), 1.0, "work")


@given(st.text())
def test_printable_text_holds_no_control_characters(text: str) -> None:
    shown = logs.printable(text)
    assert all(letter.isprintable() or letter in "\n\t" for letter in shown)


def test_printable_keeps_what_can_be_shown() -> None:
    assert logs.printable("a\tb\nä\x1b[31m\r\x9b") == "a\tb\nä\\x1b[31m\\r\\x9b"


def test_tail_is_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"".join(b"line %d\n" % number for number in range(1000)))
    assert logs.tail(path, 20) == "line 998\nline 999"
    assert logs.tail(path, since=path.stat().st_size) == ""
    assert logs.tail(path, since=path.stat().st_size - 9) == "line 999"
    assert logs.tail(path, 20, since=1 << 40) == "line 998\nline 999", "it was cut meanwhile"
    assert logs.tail(tmp_path / "absent") == ""
    path.write_bytes(b"x" * 100)
    assert logs.tail(path, 20) == "x" * 20
    assert logs.one_line("a\nb\nc\nd") == "b | c | d"


@pytest.mark.parametrize("length", [10, 120, 240])
def test_sockets_below_paths_of_any_length(tmp_path: Path, length: int) -> None:
    folder = tmp_path / ("x" * length)
    folder.mkdir()
    path = folder / "a.sock"
    with sockets.listen(path) as listener:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        with socket.socket(socket.AF_UNIX) as client:
            with sockets.address_of(path) as address:
                client.connect(address)
            listener.accept()[0].close()
        with pytest.raises(HostError, match="Address already in use"):
            sockets.listen(path)


def test_no_folder_for_a_socket(tmp_path: Path) -> None:
    for path in (tmp_path / "absent" / "a.sock", tmp_path / ("x" * 200) / "a.sock"):
        with pytest.raises(HostError, match="No such file or directory"):
            sockets.listen(path)
