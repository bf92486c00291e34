"""Commands in the guest, run by the real guest agent in a process of its own."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path

import pytest

from hva_host.agent.guest_link import GuestLink
from hvaqemu.errors import ConfigError, GuestError
from tests.unit.guest_stand_ins import Serial, eventually


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
