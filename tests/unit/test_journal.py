"""Event logs of VMs: bounded, rotated, never waited for, and read while they are written."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from hva_host.agent import event_files, journal
from hva_host.agent.event_files import EventReader, format_line, format_time, log_file
from hva_host.agent.journal import Journal
from hva_host.cli.main import main
from hvaqemu.errors import ConfigError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the logs go, also those of commands."""
    monkeypatch.setenv("HVAQEMU_STATE_DIR", str(tmp_path / "s"))
    return tmp_path / "s/events"


@pytest.fixture
def every_event(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "_BURST", 1e9)


def states(folder: Path, name: str = "web") -> list[str]:
    with EventReader(folder, name) as reader:
        return [str(event.data.get("state")) for event in reader.read()]


async def written(*events: tuple[str, dict[str, object]]) -> None:
    log = Journal()
    log.start()
    for event, data in events:
        log.write(event, data, time.monotonic())
    await log.close()


async def test_what_is_written_is_read_again(folder: Path) -> None:
    began = datetime.now(UTC) - timedelta(milliseconds=1)
    guest = "\x1b[2J\u202enow\x7f"
    await written(("VM_STATE", {"name": "web", "state": guest}), ("VM_RESET", {"name": "db", "guest": True}))
    (line,) = log_file(folder, "web").read_bytes().splitlines()
    assert line.isascii()
    assert all(32 <= byte < 127 for byte in line)
    with EventReader(folder, "web") as reader:
        (event,) = reader.read()
    assert (event.event, event.data, event.untold) == ("VM_STATE", {"name": "web", "state": guest}, 0)
    assert began <= event.time <= datetime.now(UTC)
    assert json.loads(line)["time"].endswith("Z")
    assert states(folder, "db") == ["None"]
    assert log_file(folder, "web").stat().st_mode & 0o777 == 0o600
    assert folder.stat().st_mode & 0o777 == 0o700


async def test_a_log_is_rotated_and_followed(folder: Path, every_event: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "FILE_MAX", 4096)
    monkeypatch.setattr(journal, "_BATCH_MAX", 8)
    log = Journal()
    log.start()
    log.write("VM_STATE", {"name": "web", "state": "-1"}, 0.0)
    async with asyncio.timeout(10):
        while not log_file(folder, "web").exists():  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    read: list[int] = []
    with EventReader(folder, "web") as reader:
        for number in range(500):
            log.write("VM_STATE", {"name": "web", "state": str(number)}, 0.0)
            if number % 100 == 99:
                await asyncio.sleep(0.05)
                read += [int(event.data["state"]) for event in reader.read()]
        await log.close()
        read += [int(event.data["state"]) for event in reader.read()]
        assert list(reader.read()) == []
    # Also across more rotations than one between two looks; only what is gone for good is missed.
    assert read == sorted(read)
    assert len(read) > 250
    assert read[-1] == 499
    files = sorted(folder.iterdir())
    assert [path.name for path in files] == ["web.jsonl", *(f"web.jsonl.{number}" for number in (1, 2, 3))]
    assert all(path.stat().st_size <= 4096 for path in files)
    assert states(folder)[-100:] == [str(number) for number in range(400, 500)]


async def test_a_guest_can_not_drive_it(folder: Path) -> None:
    log = Journal()
    log.start()
    for number in range(100_000):
        log.write("VM_RESET", {"name": "loops", "guest": True}, number / 1000)
    log.write("VM_STATE", {"name": "loops", "state": "running"}, 100.0)
    await log.close()
    with EventReader(folder, "loops") as reader:
        *resets, last = reader.read()
    assert 30 <= len(resets) <= 45
    assert 80_000 < len(resets) + sum(event.untold for event in resets) <= 100_000
    assert last.event == "VM_STATE"


async def test_nobody_waits_for_a_disk_that_does_not_answer(
    folder: Path, every_event: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(journal, "_CLOSE_SECONDS", 0.2)
    answers = threading.Event()

    def stuck() -> Path:
        answers.wait(30)
        return folder

    log = Journal(stuck)
    log.start()
    began = time.monotonic()
    for number in range(50_000):
        log.write("VM_STATE", {"name": "web", "state": number}, 0.0)
        if number % 1000 == 0:
            await asyncio.sleep(0)
    await log.close()
    assert time.monotonic() - began < 20
    assert log._queue.qsize() <= journal._QUEUE_MAX
    assert "could not be written" in caplog.text
    answers.set()


async def test_a_folder_that_can_not_be_written_is_complained_of_once(
    folder: Path, every_event: None, caplog: pytest.LogCaptureFixture
) -> None:
    folder.parent.mkdir()
    folder.touch()
    with caplog.at_level(logging.WARNING):
        log = Journal()
        log.start()
        for number in range(200):
            log.write("VM_STATE", {"name": f"vm{number}", "state": ""}, 0.0)
            await asyncio.sleep(0)
        await log.close()
    assert len(caplog.records) == 1
    assert "File exists" in caplog.text


async def test_a_line_cut_by_a_kill_costs_that_line_only(folder: Path) -> None:
    await written(("VM_STATE", {"name": "web", "state": "one"}))
    with log_file(folder, "web").open("ab") as file:
        file.write(b'{"time":"2026-03-01T12:00:00.000Z","ev')
    await written(("VM_STATE", {"name": "web", "state": "two"}))
    assert states(folder) == ["one", "two"]


async def test_a_huge_event_is_left_out_and_said(folder: Path) -> None:
    await written(("VM_HELD", {"name": "web", "held": ["x" * 100_000]}))
    with EventReader(folder, "web") as reader:
        (event,) = reader.read()
    assert set(event.data) == {"name", "left_out"}


def test_all_logs_together_are_bounded(tmp_path: Path) -> None:
    for number in range(10):
        path = tmp_path / f"vm{number}.jsonl"
        path.write_bytes(bytes(100))
        os.utime(path, (number, number))
    event_files.prune(tmp_path, 350)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["vm7.jsonl", "vm8.jsonl", "vm9.jsonl"]


@pytest.mark.parametrize(
    "line",
    [b"", b"[]", b"{}", b"nonsense", b'{"time":"now","event":"A","data":{}}', b"[" * 100_000,
     b'{"time":"2026-03-01T12:00:00","event":"A","data":{}}', b'{"time":"2026-03-01T12:00:00Z","event":1,"data":{}}'],
)  # fmt: skip
def test_nonsense_in_a_log_is_passed_over(line: bytes) -> None:
    assert event_files.parse_line(line) is None


# The command


Said = pytest.CaptureFixture[str]


def put(folder: Path, *events: tuple[float, str, dict[str, object]]) -> None:
    """Log events of VM web, each so many seconds ago."""
    folder.mkdir(parents=True, exist_ok=True)
    now = datetime.now(UTC)
    with log_file(folder, "web").open("ab") as file:
        for ago, event, data in events:
            file.write(format_line(now - timedelta(seconds=ago), event, {"name": "web", **data}, 3 if ago else 0))


def test_events_are_lines_for_people_or_raw(folder: Path, capsys: Said) -> None:
    stats = {"number": 7, "discarded": 1200, "candidates": 3000, "seconds": {"total": 0.25}, "note": ""}
    put(
        folder,
        (900, "VM_STATE", {"state": "running", "reason": ""}),
        (60, "EPOCH", {"stats": stats}),
        (0, "VM_STATE", {"state": "panicked", "reason": "\x1b[2Joops"}),
    )
    assert main(["events", "web"]) == 0
    first, second, third = capsys.readouterr().out.splitlines()
    assert first.split(None, 1)[1].split() == ["VM_STATE", "running", "(and", "3", "more", "before", "it)"]
    assert second.endswith("7: 1,200 of 3,000 candidates discarded in 250.0 ms (and 3 more before it)")
    assert third.endswith("panicked: \\x1b[2Joops")
    datetime.fromisoformat(third.split()[0])
    assert main(["events", "web", "--since", "5m", "--json"]) == 0
    epoch, panicked = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert (epoch["data"]["stats"], epoch["untold"], panicked["event"]) == (stats, 3, "VM_STATE")
    moment = format_time(datetime.now(UTC) - timedelta(seconds=10))
    assert main(["events", "web", "--since", moment]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_an_unknown_vm_is_one_line(folder: Path, capsys: Said) -> None:
    put(folder)
    assert main(["events", "nobody"]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == "hvaqemu: VM nobody: no events of it are recorded (there are events of: web)\n"


@pytest.mark.parametrize("since", ["yesterday", "2026-03-01T12:00:00", "-5m"])
def test_a_wrong_since_is_refused(since: str, folder: Path, capsys: Said) -> None:
    with pytest.raises(SystemExit) as exited:
        main(["events", "web", f"--since={since}"])
    assert exited.value.code == 2
    assert since in capsys.readouterr().err


@pytest.fixture
def follower(folder: Path) -> Iterator[Callable[[], str]]:
    """``hvaqemu events web --follow``; gives its next line."""
    put(folder, (0, "VM_STATE", {"state": "first", "reason": ""}))
    argv = [sys.executable, "-m", "hva_host.cli.main", "events", "web", "--follow"]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    lines: list[str] = []
    came = threading.Condition()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            with came:
                lines.append(line)
                came.notify()

    reader = threading.Thread(target=read)
    reader.start()

    def line() -> str:
        with came:
            assert came.wait_for(lambda: lines, 20), "no line came"
            return lines.pop(0)

    yield line
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == 130
    reader.join(10)
    assert process.stderr is not None
    assert process.stderr.read() == ""
    assert process.stdout is not None
    process.stdout.close()
    process.stderr.close()


def test_following_goes_on_past_a_rotation(folder: Path, follower: Callable[[], str]) -> None:
    assert "first" in follower()
    put(folder, (0, "VM_STATE", {"state": "second", "reason": ""}))
    assert "second" in follower()
    log_file(folder, "web").rename(folder / "web.jsonl.1")
    put(folder, (0, "VM_STATE", {"state": "third", "reason": ""}))
    assert "third" in follower()


def test_a_reader_of_nothing_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there are events of: none"):
        EventReader(tmp_path, "web")
