"""The command line, as a user types it, on a real guest: every command is a process of its own."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hva_host.agent.model import Measure, ReclaimResult, VmStatus
from hva_host.agent.ram_frames import RESIDENCES
from hvaqemu.pages import PAGE_SHIFT
from hvaqemu.qemu.process import DEFAULT_TIMEOUTS
from hvaqemu.units import MiB
from tests.unit.control_stand_ins import short_folder
from tests.unit.test_report_html import Page

#: Far beyond what an idle machine needs; an image may have to be built.
_SECONDS = 900.0
#: For what takes a moment where nobody else is busy.
_STEP_SECONDS = 120.0

pytestmark = pytest.mark.timeout(_SECONDS)

_FILE = """\
name: typed
memory: 512M
cpus: 2
allow_exec: true
boot_timeout: 240s
"""


@dataclass
class Cli:
    """Directories of its own, and commands in them."""

    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        return {
            **os.environ,
            "HVAQEMU_RUNTIME_DIR": str(self.folder / "r"),
            "HVAQEMU_STATE_DIR": str(self.folder / "s"),
        }

    def __call__(self, *words: str | Path, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            [sys.executable, "-m", "hva_host.cli.main", *words],
            input=stdin,
            capture_output=True,
            env=self.environment,
            timeout=_SECONDS,
        )

    def works(self, *words: str | Path, stdin: bytes = b"") -> str:
        """What a command that must succeed prints."""
        done = self(*words, stdin=stdin)
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout.decode()

    def fails(self, *words: str | Path) -> str:
        """The one line of a command that must fail."""
        done = self(*words)
        said = done.stderr.decode()
        assert done.returncode == 1, said
        lines = [line for line in said.splitlines() if line.startswith("hvaqemu: ")]
        assert len(lines) == 1, said
        assert said.endswith(lines[0] + "\n")
        return lines[0]

    def json(self, *words: str) -> Any:
        return json.loads(self.works(*words, "--json"))

    def status(self) -> VmStatus:
        return VmStatus.model_validate(self.json("status", "typed"))

    @property
    def agent(self) -> int:
        """The host agent's process."""
        return int((self.folder / "r/agent.lock").read_text())

    def processes(self) -> list[str]:
        """Live processes that have to do with our directories."""
        mark = os.fsencode(self.folder)
        found = []
        for process in Path("/proc").iterdir():
            if not process.name.isdigit() or int(process.name) == os.getpid():
                continue
            try:
                words = (process / "cmdline").read_bytes()
                if words and (mark in words or mark in (process / "environ").read_bytes()):
                    found.append(f"{process.name} {words.decode(errors='replace')}")
            except OSError:
                continue
        return found

    def nothing_runs(self) -> None:
        """End the host agent; then nothing of ours may be left, soon."""
        self.works("agent", "--stop")
        deadline = time.monotonic() + _STEP_SECONDS
        while (left := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not left
        for place in ("r/vms", "s/vms"):
            folder = self.folder / place
            assert not folder.exists() or not list(folder.iterdir())


@pytest.fixture(scope="module")
def cli() -> Iterator[Cli]:
    with short_folder() as folder:
        made = Cli(folder)
        yield made
        made.nothing_runs()


@pytest.fixture(scope="module")
def vm(cli: Cli) -> Iterator[Path]:
    """The VM's file; the VM runs."""
    file = cli.folder / "vm.yaml"
    file.write_text(_FILE)
    # Nobody has started a host agent: this does.
    done = cli("up", file)
    said = done.stderr.decode()
    assert done.returncode == 0, said
    assert said.splitlines()[-1].startswith("typed is up")
    yield file
    began = time.monotonic()
    (ended,) = cli("down", "typed").stderr.decode().splitlines()
    assert ended.startswith("typed is down: ")
    # A guest that is late is not waited for.
    assert ended.endswith(": the guest shut down") or time.monotonic() - began > DEFAULT_TIMEOUTS.powerdown
    assert cli.json("ls") == []
    assert "no such VM" in cli.fails("status", "typed")
    # What was recorded outlives the VM, and needs no host agent.
    cli.works("agent", "--stop")
    recorded = [json.loads(line) for line in cli.works("events", "typed", "--json").splitlines()]
    assert not (cli.folder / "r/control.sock").exists()
    states = [line["data"]["state"] for line in recorded if line["event"] == "VM_STATE"]
    assert (states[0], states[-1]) == ("running", "gone")
    assert [line["time"] for line in recorded] == sorted(line["time"] for line in recorded)
    assert "candidates discarded" in cli.works("events", "typed")


def test_ls_and_status(cli: Cli, vm: Path) -> None:
    (listed,) = cli.json("ls")
    status = cli.status()
    assert (listed["name"], status.name, status.state) == ("typed", "typed", "running")
    assert status.guest_connected
    assert status.guest_kernel.endswith("s390x")
    assert status.measure is not None
    assert 30 * MiB < status.measure.backing_bytes < 512 * MiB
    assert status.measure.guest_free_bytes > 0
    row = cli.works("ls").splitlines()[1].split()
    assert row[:3] == ["typed", "running", str(status.pid)]
    assert "s390x" in cli.works("status", "typed")


def test_exec(cli: Cli, vm: Path) -> None:
    done = cli("exec", "typed", "--", "sh", "-c", 'echo "$@"; echo oh >&2; exit 7', "sh", "a  b", "--", "--json")
    assert (done.returncode, done.stdout, done.stderr) == (7, b"a  b -- --json\n", b"oh\n")
    raw = bytes(range(256)) * 40
    done = cli("exec", "typed", "--stdin", "--", "cat", stdin=raw)
    assert (done.returncode, done.stdout) == (0, raw)
    assert cli("exec", "typed", "--", "sh", "-c", "kill -9 $$").returncode == 128 + signal.SIGKILL
    began = time.monotonic()
    done = cli("exec", "typed", "--timeout", "1s", "--", "sleep", "60")
    assert done.returncode == 124
    assert b"not done after 1.0 s" in done.stderr
    assert time.monotonic() - began < 30
    assert "nowhere" in cli.fails("exec", "typed", "--", "/nowhere")


def test_reclaim_and_restore_and_every_byte_is_the_same(cli: Cli, vm: Path) -> None:
    script = "find /usr/bin /usr/lib/python3* -xdev -type f -print0 | sort -z | xargs -0 md5sum | md5sum"
    digest = ("exec", "typed", "--timeout", "300s", "--", "sh", "-c", script)
    before = cli.works(*digest)
    filled = _measure(cli)
    done = cli("reclaim", "typed", "--states", "volatile,unused", "--json")
    assert done.returncode == 0, done.stderr.decode()
    result = ReclaimResult.model_validate_json(done.stdout)
    # Every epoch is told while it goes on.
    assert [line.split()[:2] for line in done.stderr.decode().splitlines()] == [
        ["epoch", f"{stats.number}:"] for stats in result.epochs
    ]
    reclaimed = _measure(cli)
    assert result.discarded > 5000
    assert reclaimed.backing_bytes < filled.backing_bytes - 20 * MiB
    assert reclaimed.layer_pages > 0
    assert cli.works(*digest) == before
    assert _measure(cli).refault_pages > reclaimed.refault_pages
    cli.works("reclaim", "typed", "--epochs", "1")
    assert cli.json("restore", "typed")["pages"] > 0
    restored = _measure(cli)
    # The guest may have freed and ballooned nothing: what is away now was discarded by nobody.
    assert restored.layer_pages == 0
    assert cli.json("resume", "typed") == {"held": 0}
    assert cli.works(*digest) == before
    assert "EPOCH" in cli.works("status", "typed")


def test_a_report_shows_what_the_status_says(cli: Cli, vm: Path, tmp_path: Path) -> None:
    cli.works("exec", "typed", "--timeout", "300s", "--", "sh", "-c", "cat /usr/bin/* | md5sum")
    cli.works("reclaim", "typed")
    path = tmp_path / "typed.html"
    deadline = time.monotonic() + 60
    while True:
        assert cli.works("report", "typed", "-o", path) == f"{path}\n"
        made = Page(path.read_text())
        (found,) = made.data["maps"].values()
        raw = zlib.decompress(base64.b64decode(found["residence"]["shares"]))
        resident, _, layer, _ = (
            np.frombuffer(raw, np.uint8).reshape(-1, len(RESIDENCES), found["cells"])[-1].mean(axis=1)
        )
        measure, pages = _measure(cli), (512 * MiB) >> PAGE_SHIFT
        away = abs(layer / 255 - measure.layer_pages / pages), abs(resident / 255 - measure.resident_pages / pages)
        # A map follows an epoch within seconds, and the guest goes on meanwhile.
        if measure.layer_pages > 5000 and max(away) < 0.01:
            break
        assert time.monotonic() < deadline, away
    assert found["states"]["known"][-1]
    assert {"QEMU", "guest kernel", "hvaqemu"} <= set(made.texts["th"])
    assert len(made.data["timelines"]["run-timeline"]["at"]) >= 2


def _measure(cli: Cli) -> Measure:
    measure = cli.status().measure
    assert measure is not None
    return measure


def test_console(cli: Cli, vm: Path) -> None:
    assert "Linux version" in cli.works("console", "typed")
    cli.works("exec", "typed", "--", "sh", "-c", "printf '\\033[2Jhello\\n' > /dev/console")
    deadline = time.monotonic() + _STEP_SECONDS
    while "\x1b[2Jhello" not in cli.works("console", "typed"):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    followed = subprocess.Popen(
        # A terminal of its own: what the guest writes must come out escaped.
        ["script", "-qec", f"{sys.executable} -m hva_host.cli.main console typed --follow", "/dev/null"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        env=cli.environment,
    )
    assert followed.stdout is not None
    try:
        seen = b""
        while b"hello" not in seen:
            seen += os.read(followed.stdout.fileno(), 1 << 16)
        cli.works("exec", "typed", "--", "sh", "-c", "echo more > /dev/console")
        while b"more" not in seen:
            seen += os.read(followed.stdout.fileno(), 1 << 16)
        assert rb"\x1b[2Jhello" in seen
        assert b"\x1b" not in seen
    finally:
        followed.send_signal(signal.SIGTERM)
        followed.stdout.close()
        followed.wait(60)


def test_a_name_is_used_once(cli: Cli, vm: Path) -> None:
    pid = cli.status().pid
    assert cli.fails("up", vm).startswith("hvaqemu: VM typed: the name is taken")
    scenario = cli.folder / "scenario.yaml"
    scenario.write_text("vm: {name: typed, memory: 512M}\nsteps: []\n")
    assert "name is taken" in cli.fails("run", scenario)
    assert cli.status().pid == pid


def test_bad_files_are_one_line(cli: Cli, vm: Path) -> None:
    file = cli.folder / "bad.yaml"
    for text, says in (
        ("name: bad\nmemory: 512M\nflavour: sweet\n", "flavour"),
        ("name: bad\nmemory: 1M\n", "memory"),
        ("name: bad\nmemory: 512M\nimage: nowhere.yaml\n", "nowhere.yaml"),
        ("name: bad\nmemory: 512M\nimage: no-such-image\n", "no-such-image"),
        ("name: bad\nmemory: 512M\nextra_disks: [{path: nowhere.raw}]\n", "nowhere.raw"),
        ("name: bad\nmemory: 512M\nextra_disks: [{path: .}]\n", "is not a file"),
        ("name: [bad\n", "bad.yaml:"),
    ):
        file.write_text(text)
        assert says in cli.fails("up", file)
    file.write_text(_FILE.replace("typed", "late"))
    said = cli.fails("up", file, "--timeout", "500ms")
    assert "late" in said or "guest" in said
    assert [each["name"] for each in cli.json("ls")] == ["typed"]
    assert [path.name for path in (cli.folder / "r/vms").iterdir()] == ["typed"]
    assert not any("late" in line for line in cli.processes())


def test_ctrl_c_leaves_nothing_behind(cli: Cli, vm: Path) -> None:
    file = cli.folder / "other.yaml"
    file.write_text(_FILE.replace("typed", "other"))
    assert _interrupted(cli, ["up", str(file)], b"booting the guest") == 130
    deadline = time.monotonic() + 60
    while (cli.folder / "r/vms/other").exists() or (cli.folder / "s/vms/other").exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert [each["name"] for each in cli.json("ls")] == ["typed"]
    script = "echo $$ > /tmp/pid; exec sleep 4321"
    waiting = subprocess.Popen(
        [sys.executable, "-m", "hva_host.cli.main", "exec", "typed", "--timeout", "300s", "--", "sh", "-c", script],
        env=cli.environment,
    )
    try:
        # The shell makes the file before it writes to it.
        _until_in_guest(cli, "test -s /tmp/pid && test -d /proc/$(cat /tmp/pid)")
    finally:
        waiting.send_signal(signal.SIGINT)
        assert waiting.wait(60) == 130
    _until_in_guest(cli, "! test -d /proc/$(cat /tmp/pid)")


def _interrupted(cli: Cli, words: list[str], line: bytes) -> int:
    """The exit code of a command that gets SIGINT once it has printed ``line``."""
    with subprocess.Popen(
        [sys.executable, "-m", "hva_host.cli.main", *words], stderr=subprocess.PIPE, env=cli.environment
    ) as process:
        assert process.stderr is not None
        while (said := process.stderr.readline()) and line not in said:
            pass
        process.send_signal(signal.SIGINT)
        assert b"Traceback" not in process.stderr.read()
        return process.wait(60)


def _until_in_guest(cli: Cli, condition: str) -> None:
    """Wait until a shell condition holds in the guest."""
    deadline = time.monotonic() + 30
    while cli("exec", "typed", "--", "sh", "-c", condition).returncode != 0:
        assert time.monotonic() < deadline, condition
        time.sleep(0.2)


def test_dry_run_starts_nothing(cli: Cli, vm: Path) -> None:
    before = cli.processes()
    said = cli.works("up", vm, "--dry-run")
    assert said.startswith("qemu-system-s390x ")
    assert said.count("\n") == 1
    assert set(cli.processes()) <= set(before)


def test_the_host_agent_may_come_and_go(cli: Cli, vm: Path) -> None:
    status = cli.status()
    cli.works("exec", "typed", "--", "sh", "-c", "echo kept > /tmp/kept")
    for number in (signal.SIGTERM, signal.SIGKILL):
        agent = cli.agent
        os.kill(agent, number)
        again = cli.status()
        assert cli.agent != agent
        assert (again.pid, again.state) == (status.pid, "running")
        assert _exec_when_connected(cli, "cat", "/tmp/kept") == "kept\n"
    assert cli.json("reclaim", "typed", "--epochs", "1")["discarded"] >= 0


def _exec_when_connected(cli: Cli, *words: str) -> str:
    deadline = time.monotonic() + 60
    while not cli.status().guest_connected:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    return cli.works("exec", "typed", "--", *words)
