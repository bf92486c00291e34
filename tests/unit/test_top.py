"""``hvaqemu top``: what it works out from two looks, how it fits the screen, and what its keys do."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from rich.text import Text

from hva_host.agent.event_files import format_line, log_file
from hva_host.agent.model import Measure, PolicyStatus, StallStats, VmState, VmStatus
from hva_host.cli import top_screen
from hva_host.cli.main import main
from hva_host.cli.terminal import keys
from hva_host.cli.top_view import Look, Rates, Residences, TopView, top_view
from hvaqemu.units import MiB
from tests.terminal import Terminal
from tests.unit.control_stand_ins import MEASURE, Agent, epoch, short_folder

# What is worked out


def vm(name: str = "web", pid: int = 1, **more: Any) -> VmStatus:
    measure = {field: more.pop(field) for field in list(more) if field in Measure.model_fields}
    given: dict[str, Any] = {
        "state": VmState.RUNNING,
        "pager_pid": 2,
        "guest_connected": True,
        "memory_bytes": 256 * MiB,
        "measure": MEASURE.model_copy(update=measure),
        "states": {"stable": 10, "unused": 20},
        "epochs": [epoch(4, 100)],
    }
    return VmStatus(name=name, pid=pid, **(given | more))


def rates(before: VmStatus, now: VmStatus, seconds: float = 2.0) -> Rates | None:
    (row,) = top_view(Look(10.0, [before]), Look(10.0 + seconds, [now])).vms
    return row.rates


def test_rates_are_what_came_between_two_looks() -> None:
    found = rates(
        vm(refaults=100, layer_refaults=10, refault_pages=0, stalls=StallStats(sum_s=1.0)),
        vm(refaults=300, layer_refaults=40, refault_pages=512, stalls=StallStats(sum_s=1.5)),
    )
    assert found == Rates(
        refaults=100, zero_refaults=0, layer_refaults=15, preserved_refaults=0, refaulted_bytes=MiB, waited_s=0.25
    )


def test_there_are_no_rates_of_a_vm_that_was_not_there_before() -> None:
    assert top_view(None, Look(1.0, [vm()])).vms[0].rates is None
    assert top_view(None, Look(1.0, [vm()])).interval_s is None
    assert rates(vm(), vm(pid=2)) is None
    assert rates(vm(), vm(measure=None)) is None
    assert rates(vm(measure=None), vm()) is None
    assert rates(vm(), vm(), 0.0) is None
    # A pager that has lost its counters is no refault less than none.
    assert (rates(vm(refaults=5), vm(refaults=2)) or Rates.model_construct(refaults=9)).refaults == 0


def test_residences_and_totals() -> None:
    view = top_view(None, Look(0.0, [vm("web"), vm("db", measure=None), vm("abc", backing_bytes=MiB)]))
    assert [row.name for row in view.vms] == ["abc", "db", "web"]
    assert view.memory_bytes == 3 * 256 * MiB
    assert view.backing_bytes == 97 * MiB
    # The host agent is one, whatever each VM says of it.
    assert view.own_bytes == 2 * (50 + 30) * MiB + 40 * MiB
    web = view.vms[2].residences
    assert web == Residences(
        resident_bytes=96 * MiB, preserved_bytes=0, layer_bytes=2 * MiB, zero_bytes=MiB, untouched_bytes=157 * MiB
    )
    assert view.vms[1].residences is None
    assert TopView.model_validate_json(view.model_dump_json()) == view


@given(st.lists(st.integers(0, 1 << 40), min_size=5, max_size=5), st.integers(1, 60), st.booleans())
def test_a_bar_is_as_wide_as_it_is_to_be(sizes: list[int], width: int, ascii_only: bool) -> None:
    made = top_screen.bar(Residences(**dict(zip(Residences.model_fields, sizes, strict=True))), width, ascii_only)
    assert len(made.plain) == width or sum(sizes) == 0
    assert made.plain.isascii() or not ascii_only


def test_a_bar_shows_shares() -> None:
    quarter = Residences(resident_bytes=50, preserved_bytes=25, layer_bytes=0, zero_bytes=25, untouched_bytes=0)
    assert top_screen.bar(quarter, 8, ascii_only=True).plain == "####ppzz"
    assert top_screen.bar(None, 4, ascii_only=True).plain == "?   "


def test_the_list_fits_80_columns() -> None:
    many = [
        vm("n" * 63, backing_bytes=1023 * MiB, store_bytes=1023 * MiB, refaults=10**6),
        vm("held", state=VmState.HELD, reason="x\x1b[2J" * 50),
        vm("panicked", state=VmState.PANICKED),
    ]
    view = top_view(Look(0.0, [vm("n" * 63)]), Look(1.0, many))
    console = Console(width=80, height=24, record=True, file=io.StringIO(), force_terminal=True)
    for part in (top_screen.head(view), top_screen.legend(False), top_screen.listed(view, "held", False)):
        console.print(part)
    for row in view.vms:
        for line in top_screen.details(row):
            console.print(line)
    text = console.export_text()
    assert "1023.0 MiB" in text
    assert "PANICKED" in text
    assert "HELD" in text
    assert "998,766/s" in text
    assert "\x1b" not in text
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 80


def test_refaults_are_shown_against_what_policy_allows() -> None:
    policy = PolicyStatus(mode="proactive", phase="cooling", refaults_per_minute=90, budget_per_minute=60)
    view = top_view(None, Look(0.0, [vm(policy=policy)]))
    assert any(
        "proactive, cooling; 90 of 60 allowed refaults/min" in str(line) for line in top_screen.details(view.vms[0])
    )
    styles = [
        str(cell.style) for cell in top_screen.listed(view, None, True).columns[6].cells if isinstance(cell, Text)
    ]
    assert styles == ["yellow"]
    within = view.vms[0].model_copy(update={"policy": policy.model_copy(update={"budget_per_minute": 90})})
    assert "yellow" not in str(top_screen.details(within)[-2].style)


@pytest.mark.parametrize(
    ("data", "pressed"),
    [
        (b"q", ["q"]),
        (b"\x1b[A\x1b[Bp", ["up", "down", "p"]),
        (b"\x1bOA\x1bOB", ["up", "down"]),
        (b"\x1b[1;5A\x1b[15~r", ["r"]),
        (b"\x1b", []),
        (b"\x1b[", []),
        ("é\x00\x7f".encode(), []),
        (b"\x1b[" + b"1" * 1000, []),
    ],
)
def test_keys(data: bytes, pressed: list[str]) -> None:
    assert [key for key in keys(data) if key != "1"] == pressed


# The command, without a terminal


Said = pytest.CaptureFixture[str]
_SHORT = ["--interval", "10ms"]


def test_without_a_terminal_it_prints_once(agent: Agent, capsys: Said) -> None:
    assert main(["top", *_SHORT]) == 0
    assert capsys.readouterr().out == "no VM is running; start one with: hvaqemu up VM.yaml\n"
    agent.add("web")
    agent.add("held", lambda vm: setattr(vm, "state", VmState.HELD))
    assert main(["top", "--once", *_SHORT]) == 1
    said = capsys.readouterr()
    lines = said.out.splitlines()
    assert lines[0].startswith("2 VMs: given 512.0 MiB, backing 192.0 MiB, store 0 B, our own ")
    assert lines[1].split() == ["NAME", "STATE", "MEMORY", "BACKING", "STORE", "REFAULTS", "WAITED"]
    assert lines[3].split()[:2] == ["web", "running"]
    assert lines[3].split()[-2:] == ["0/s", "0.0%"]
    assert said.out.isascii()
    assert "HELD" in said.err
    assert main(["top", "--json", *_SHORT]) == 1
    view = TopView.model_validate(json.loads(capsys.readouterr().out))
    assert [row.name for row in view.vms] == ["held", "web"]
    assert view.interval_s is not None
    assert 0.01 <= view.interval_s < 10


def test_without_a_host_agent_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: Said) -> None:
    with short_folder() as folder:
        monkeypatch.setenv("HVAQEMU_RUNTIME_DIR", str(folder))
        assert main(["top"]) == 1
        said = capsys.readouterr()
        assert said.out == ""
        assert said.err == f"hvaqemu: {folder}: no host agent runs (`hvaqemu up` starts one; `hvaqemu ls`, too)\n"
        # It was not started for that.
        assert not list(folder.iterdir())


# In a terminal

Start = Callable[..., Terminal]


@pytest.fixture
def start(agent: Agent, tmp_path: Path) -> Iterator[Start]:
    """``hvaqemu top`` in a terminal."""
    running: list[Terminal] = []

    def started(**more: int) -> Terminal:
        environment = {**os.environ, "HVAQEMU_STATE_DIR": str(tmp_path / "s"), "TERM": "xterm-256color"}
        argv = [sys.executable, "-m", "hva_host.cli.main", "top", "--interval", "200ms"]
        running.append(Terminal(argv, environment, **more))
        return running[-1]

    yield started
    for terminal in running:
        terminal.__exit__(None, None, None)


def test_it_shows_all_and_more_of_one(agent: Agent, start: Start, tmp_path: Path) -> None:
    log = log_file(tmp_path / "s/events", "beta")
    log.parent.mkdir(parents=True)
    now = datetime.now(UTC)
    log.write_bytes(format_line(now, "VM_STATE", {"name": "beta", "state": "running", "reason": "\x1b[2J"}, 0))
    for name in ("alpha", "beta", "gamma"):
        agent.add(name)
    top = start()
    top.wait_for("> alpha")
    assert top.lines[0].startswith("3 VMs: given 768.0 MiB")
    top.wait_for("q quit", line=23)
    assert len(top.lines) == 24
    top.press("\x1b[B")
    top.wait_for("> beta")
    top.wait_for("VM_STATE running: \\x1b[2J")
    assert "last epoch 1: 100 of 103 candidates discarded" in top.text
    top.press("jjjj")
    top.wait_for("> gamma")
    top.press("k")
    top.wait_for("> beta")
    agent.do(lambda: agent._served.fleet.machines.pop("beta"))
    top.wait_for("> alpha")
    top.press("q")
    assert top.ended() == 0
    assert top.is_as_before()


def test_keys_do_what_they_say(agent: Agent, start: Start) -> None:
    alpha, beta = agent.add("alpha"), agent.add("beta")
    top = start()
    top.wait_for("> alpha")
    top.press("p")
    top.wait_for("alpha: is paused")
    assert alpha.asked == [("stop", {}, 30.0)]
    agent.do(lambda: setattr(alpha, "state", VmState.PAUSED))
    top.wait_for("paused  ")
    top.press("p")
    top.wait_for("alpha: goes on")
    assert alpha.asked[1:] == [("cont", {}, 30.0)]
    top.press("jr")
    top.wait_for("beta: 100.0 MiB given back")
    assert len(beta.asked) == 1
    agent.do(beta.go_on.clear)
    top.press("o")
    top.wait_for("beta: restore ...")
    top.press("o")
    top.wait_for("beta: restore is still going on")
    agent.do(beta.go_on.set)
    top.wait_for("beta: 768 pages made resident")
    top.press("x\x1b[H?")
    top.press("q")
    assert top.ended() == 0


def test_a_refusal_is_a_line(agent: Agent, start: Start) -> None:
    agent.add("alpha")
    top = start()
    top.wait_for("> alpha")
    agent.do(lambda: agent._served.fleet.machines.clear())
    top.press("r")
    top.wait_for("no VM is running")
    top.press("p")
    top.send(signal.SIGTERM)
    assert top.ended() == 128 + signal.SIGTERM


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)], ids=lambda each: str(each)
)
def test_every_end_gives_the_terminal_back(agent: Agent, start: Start, number: signal.Signals, code: int) -> None:
    agent.add("alpha")
    top = start()
    top.wait_for("> alpha")
    assert not top.is_as_before()
    if number is signal.SIGINT:
        top.press("\x03")
    else:
        top.send(number)
    assert top.ended() == code
    assert top.is_as_before()


def test_ctrl_z_gives_the_terminal_back_for_a_while(agent: Agent, start: Start) -> None:
    agent.add("alpha")
    top = start()
    top.wait_for("> alpha")
    top.press("\x1a")
    top.stopped()
    assert top.is_as_before()
    agent.add("beta")
    top.send(signal.SIGCONT)
    top.wait_for("beta")
    assert not top.is_as_before()
    top.press("q")
    assert top.ended() == 0
    assert top.is_as_before()


def test_a_terminal_that_goes_ends_it(agent: Agent, start: Start) -> None:
    agent.add("alpha")
    top = start()
    top.wait_for("> alpha")
    top.hang_up()
    assert top.ended() in (0, 129)


def test_it_fits_another_size(agent: Agent, start: Start) -> None:
    for number in range(40):
        agent.add(f"vm{number:02}")
    top = start(columns=80, lines=24)
    top.wait_for("> vm00")
    top.wait_for("q quit", line=23)
    top.press("j" * 39)
    top.wait_for("> vm39")
    assert top.lines[0].startswith("40 VMs")
    top.resize(80, 20)
    top.wait_for("q quit", line=19)
    assert "> vm39" in top.text


def test_a_host_agent_that_goes_is_waited_for(agent: Agent, start: Start) -> None:
    agent.add("alpha")
    top = start()
    top.wait_for("> alpha")
    agent.do(lambda: agent._served.server._server.close())  # type: ignore[union-attr]
    for session in list(agent._served.server._sessions):
        agent.do(session._writer.transport.abort)
    agent.do(lambda: agent._served.path.unlink(missing_ok=True))
    top.wait_for("it is tried again")
    top.press("q")
    assert top.ended() == 0
    assert top.is_as_before()
