"""A console log stays bounded while QEMU goes on appending to it."""

from __future__ import annotations

import os
from pathlib import Path

from hva_host.agent.console_log import LOG_MAX, trim


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
