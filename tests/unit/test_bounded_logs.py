"""A log stays bounded while others go on appending to it, and says the same thing only so often."""

from __future__ import annotations

import asyncio
import logging
import os
from pathlib import Path

import pytest

from hva_host.agent.bounded_logs import LOG_MAX, keep_bounded, trim
from hva_host.agent.event_log import EventLog


def test_a_log_that_grew_keeps_its_last_lines(tmp_path: Path) -> None:
    path = tmp_path / "console.log"
    writer = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        for number in range(LOG_MAX // 16 + 1):
            os.write(writer, b"line %10d\n" % number)
        assert trim(path)
        os.write(writer, b"written afterwards\n")
        lines = path.read_bytes().splitlines()
        assert lines[0] == b"[earlier lines were dropped]"
        assert lines[-2] == b"line %10d" % (LOG_MAX // 16)
        assert lines[-1] == b"written afterwards"
        assert path.stat().st_size < LOG_MAX
        assert not trim(path)
    finally:
        os.close(writer)


async def test_all_logs_of_a_vm_are_looked_at(tmp_path: Path) -> None:
    logs = [tmp_path / name for name in ("qemu.log", "missing.log", "pager.log")]
    for path in (logs[0], logs[2]):
        path.write_bytes(b"a line\n" * (LOG_MAX // 7 + 1))
    task = asyncio.create_task(keep_bounded(*logs))
    try:
        async with asyncio.timeout(10):
            while any(path.exists() and path.stat().st_size > LOG_MAX for path in logs):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
    finally:
        task.cancel()
        await asyncio.wait({task})
    assert logs[2].read_bytes().startswith(b"[earlier lines were dropped]\na line\n")


def test_what_a_guest_repeats_is_counted(caplog: pytest.LogCaptureFixture) -> None:
    events = EventLog()
    with caplog.at_level(logging.INFO):
        for number in range(100_000):
            events.write("VM_RESET", {"name": "loops", "guest": True}, number / 1000)
        said = [record.message for record in caplog.records]
        # 30 at once, then one every ten seconds.
        assert 30 <= len(said) <= 45
        assert said[0] == 'VM_RESET {"name": "loops", "guest": true}'
        told = sum(int(line.split(" more before")[0].rpartition(" ")[2]) for line in said if "more before" in line)
        assert 80_000 < told + len(said) <= 100_000
        caplog.clear()
        events.write("VM_RESET", {"name": "other", "guest": True}, 100.0)
        events.write("VM_STATE", {"name": "loops", "state": "running"}, 100.0)
        events.write("EPOCH", {"name": "loops"}, 100.0)
        assert [record.message.split()[0] for record in caplog.records] == ["VM_RESET", "VM_STATE"]


def test_log_accounts_are_bounded() -> None:
    events = EventLog()
    for number in range(10_000):
        events.write("VM_STATE", {"name": str(number)}, 0.0)
    assert len(events._rates._accounts) <= 4096
