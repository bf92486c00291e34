"""A host agent with a fleet file: VMs start, limits are kept to, changes are taken up while guests go on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.unit.control_stand_ins import short_folder
from tests.vm.test_cli import Cli

pytestmark = [pytest.mark.vm, pytest.mark.timeout(900)]

_SECONDS = 300.0
_FLEET = """\
budget: {budget}
defaults: {{reclaim: {{mode: {mode}}}}}
vms:
  - first.yaml
  - {{name: second, memory: 256M, allow_exec: true, boot_timeout: 240s, reclaim: {{min_resident: 96M}}}}
"""
_FIRST = "name: first\nmemory: 256M\nallow_exec: true\nboot_timeout: 240s\n"


@pytest.fixture
def cli() -> Iterator[Cli]:
    with short_folder() as folder:
        cli = Cli(folder)
        (folder / "r").mkdir(mode=0o700)
        (folder / "first.yaml").write_text(_FIRST)
        try:
            yield cli
        finally:
            for name in ("first", "second"):
                cli("down", name)
            cli("agent", "--stop")


def fleet(cli: Cli, budget: str = "2G", mode: str = "manual") -> Path:
    path = cli.folder / "fleet.yaml"
    path.write_text(_FLEET.format(budget=budget, mode=mode))
    return path


def until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + _SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"still waiting for {what}"
        time.sleep(0.2)


def running(cli: Cli) -> list[str]:
    return [vm["name"] for vm in cli.json("ls") if vm["state"] == "running"]


def test_a_fleet_starts_and_follows_its_file(cli: Cli) -> None:
    path = fleet(cli)
    command = [sys.executable, "-m", "hva_host.cli.main", "agent", "--config", str(path)]
    with subprocess.Popen(command, env=cli.environment, stderr=subprocess.PIPE, text=True) as agent:
        try:
            assert agent.stderr is not None
            until(lambda: "serves" in agent.stderr.readline(), "the host agent")  # type: ignore[union-attr]
            until(lambda: running(cli) == ["first", "second"], "both VMs")
            guests = [cli.json("status", name)["pid"] for name in ("first", "second")]
            assert cli.json("set", "first")["mode"] == "manual"
            assert cli.json("set", "second")["min_resident"] == 96 << 20

            # What somebody sets stays until the file says something else of that VM.
            cli.works("set", "second", "min_resident=100M")
            cli.works("agent", "--reload")
            assert cli.json("set", "second")["min_resident"] == 100 << 20

            fleet(cli, mode="proactive")
            agent.send_signal(signal.SIGHUP)
            until(lambda: cli.json("set", "first")["mode"] == "proactive", "the change to be taken up")
            assert cli.json("set", "second")["min_resident"] == 96 << 20
            cli.works("set", "second", "min_resident=100M")

            # A file that is wrong changes nothing, and says why.
            path.write_text("budget: 2G\nvmss: []\n")
            assert "vmss" in cli.fails("agent", "--reload")
            assert cli.json("set", "first")["mode"] == "proactive"

            # One that was killed is followed by another with the same file, and takes nothing from the guests.
            agent.kill()
            agent.wait()
            until(lambda: running(cli) == ["first", "second"], "both VMs to be adopted")
            assert cli.json("set", "second")["min_resident"] == 100 << 20
            os.kill(cli.agent, signal.SIGKILL)
            fleet(cli, mode="pressure")
        finally:
            agent.kill()
    until(lambda: running(cli) == ["first", "second"], "both VMs to be adopted")
    assert cli.json("set", "first")["mode"] == "pressure"
    assert cli.json("set", "second")["min_resident"] == 96 << 20
    assert [cli.json("status", name)["pid"] for name in ("first", "second")] == guests


def test_words_on_a_command_line(cli: Cli) -> None:
    cli.works("up", cli.folder / "first.yaml")
    assert "reclaim.mode" in cli.works("set", "first", "mode=target", "target=100M")
    assert cli.json("set", "first")["target"] == 100 << 20
    assert "refault_budget" in cli.fails("set", "first", "refault_budget=much")
    assert "reclaim.modus" in cli.fails("set", "first", "modus=off")
    assert cli.json("set", "first", "mode=off")["target"] is None
    assert "reclaim is off" in cli.fails("reclaim", "first")
    assert "second" in cli.fails("set", "second", "mode=off")
    # The host agent that comes next knows it too.
    os.kill(cli.agent, signal.SIGKILL)
    assert cli.json("set", "first")["mode"] == "off"


def test_a_wrong_fleet_file_starts_nothing(cli: Cli) -> None:
    path = cli.folder / "fleet.yaml"
    path.write_text("vms: [nowhere.yaml]\n")
    assert "nowhere.yaml" in cli.fails("agent", "--config", path)
    assert cli.json("ls") == []
