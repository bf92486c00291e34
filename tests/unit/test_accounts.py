"""What processes occupy, and which one writes a log."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hva_host.agent import accounts
from hvaqemu.qemu.process import QemuProcess

_EATER = """
import sys
sys.stdin.readline()
kept = b"x" * (32 << 20)
print("full", flush=True)
sys.stdin.read()
"""


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


def test_of_several_processes_the_group_that_holds_all_counts_and_who_is_gone_has_none() -> None:
    with subprocess.Popen(["true"]) as gone:
        pass
    own = accounts.control_group(os.getpid())
    assert accounts.common_group([]) is None
    assert accounts.common_group([gone.pid]) is None
    found = accounts.common_group([gone.pid, os.getpid()])
    assert (found and found.limit) == (own and own.limit)


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
    memory = accounts.host_memory()
    assert 0 < memory.available <= memory.total


def test_a_limited_control_group_has_less_available() -> None:
    mount = accounts._CGROUP1 if (accounts._CGROUP1 / "memory.limit_in_bytes").exists() else accounts._CGROUP2
    name = "memory.limit_in_bytes" if mount == accounts._CGROUP1 else "memory.max"
    group = mount / f"hva-test-{os.getpid()}"
    try:
        group.mkdir()
        (group / name).write_text(str(64 << 20))
    except OSError as error:
        if group.is_dir():
            group.rmdir()
        pytest.skip(f"no control group can be made here: {error}")
    child = subprocess.Popen([sys.executable, "-c", _EATER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdin is not None and child.stdout is not None
        assert accounts.available_to(child.pid) > 64 << 20
        (group / "cgroup.procs").write_text(str(child.pid))
        before = accounts.available_to(child.pid)
        assert 32 << 20 < before <= 64 << 20
        child.stdin.write("eat\n")
        child.stdin.flush()
        assert child.stdout.readline() == "full\n"
        assert before - (40 << 20) < accounts.available_to(child.pid) < before - (24 << 20)
        # A limit further up counts as well.
        (group / "below").mkdir()
        (group / "below" / "cgroup.procs").write_text(str(child.pid))
        assert accounts.available_to(child.pid) < before
    finally:
        child.kill()
        child.communicate()
        if (group / "below").is_dir():
            (group / "below").rmdir()
        group.rmdir()
    assert accounts.available_to(child.pid) == 0
