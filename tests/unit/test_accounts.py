"""What processes occupy, and which one writes a log."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hva_host.agent import accounts
from hvaqemu.qemu.process import QemuProcess


def test_own_memory_leaves_shared_memory_out() -> None:
    code = (
        "import mmap, sys\n"
        "kept = mmap.mmap(-1, 64 << 20)\n"
        "for at in range(0, 64 << 20, 4096): kept[at] = 1\n"
        "print('ready', flush=True)\nsys.stdin.read()\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        assert accounts.all_memory(child.pid) > 64 << 20
        assert 0 < accounts.own_memory(child.pid) < 40 << 20
        child.kill()
    assert accounts.own_memory(child.pid) == 0


async def test_the_writer_of_a_log_is_found_and_can_be_adopted(tmp_path: Path) -> None:
    log = tmp_path / "qemu.log"
    with log.open("w") as file:
        child = subprocess.Popen(["sleep", "60"], stdout=file)  # noqa: ASYNC220
    try:
        ((pid, start_time),) = accounts.writers(log)
        assert pid == child.pid
        process = QemuProcess.adopt(pid, start_time, log)
        process.close()
        assert accounts.uptime(start_time) < 60
    finally:
        child.kill()
        child.wait()
    assert accounts.writers(log) == []


@pytest.mark.parametrize("cachestat", [451, 100_000], ids=["cachestat", "mincore"])
def test_how_much_of_a_file_is_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cachestat: int) -> None:
    monkeypatch.setattr(accounts, "_SYS_CACHESTAT", cachestat)
    path = tmp_path / "file"
    path.write_bytes(os.urandom(1 << 20))
    assert accounts.cached_bytes(path) == 1 << 20
    assert accounts.cached_bytes(tmp_path / "missing") == 0
    assert accounts.available() > 0
