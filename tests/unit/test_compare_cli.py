"""``hvaqemu compare``: exit codes, its output, and what is found wrong before anything is started."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from hva_host.agent.model import ExecResult
from hva_host.cli.main import main
from hva_host.compare import runner
from tests.unit.compare_stand_ins import Fleets, StandInComparedFleet, without_waits

_SCENARIO = """\
vm: {name: vm, memory: 512M, allow_exec: true}
steps:
  - guest: work
    save: a
  - measure: filled
  - reclaim: {}
  - guest: work
    save: b
  - same: [a, b]
"""

Said = pytest.CaptureFixture[str]


class Comparing:
    """The command in a folder of its own, on guests that are none."""

    def __init__(self, folder: Path) -> None:
        self.outputs = ["same"]
        self.fleets = Fleets(folder, self._command)
        self.file = folder / "scenario.yaml"
        self.file.write_text(_SCENARIO)

    async def _command(self, line: str) -> ExecResult:
        said = self.outputs.pop(0) if len(self.outputs) > 1 and line == "work" else self.outputs[0]
        return ExecResult(exit_status=0, stdout=said.encode())

    def __call__(self, *words: str) -> int:
        return main(["compare", str(self.file), *words])


@pytest.fixture
def comparing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Comparing:
    without_waits(monkeypatch)
    made = Comparing(tmp_path)
    monkeypatch.setattr(runner, "Fleet", lambda *_, **kept: made.fleets(kept["on_event"]))
    return made


def test_all_methods_are_compared_and_shown(comparing: Comparing, tmp_path: Path, capsys: Said) -> None:
    assert comparing("--report", str(tmp_path / "report"), "--json", str(tmp_path / "all.json")) == 0
    out = capsys.readouterr().out
    assert "DONE: every method that works did all the work" in out
    assert "comparison.png" in out
    data = json.loads((tmp_path / "all.json").read_text())
    assert [run["method"] for run in data["runs"]] == ["none", "balloon", "free-page-reporting", "hva"]
    assert json.loads((tmp_path / "report" / "comparison.json").read_text()) == data


def test_json_on_standard_output_is_alone_there(comparing: Comparing, capsys: Said) -> None:
    assert comparing("--methods", "hva,none", "--json", "-") == 0
    said = capsys.readouterr()
    data = json.loads(said.out)
    assert data["ok"] is True
    assert [run["outcome"] for run in data["runs"]] == ["ok", "ok"]
    assert "method 2 of 2: none" in said.err
    assert "DONE" in said.err


def test_bytes_that_differ_are_exit_code_1(comparing: Comparing, capsys: Said) -> None:
    comparing.outputs = ["1", "2", "1"]
    assert comparing("--methods", "none,hva") == 1
    assert "none: b is not the same as a" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--methods", "none,ballon"], "--methods: 'ballon' is not a method (known: none, balloon"),
        (["--methods", "hva,hva"], "--methods: hva is there twice"),
        (["--json", "."], "--json .: is a folder"),
        (["--json", "nowhere/x.json"], "--json nowhere/x.json: its folder is not there"),
        (["--report", "scenario.yaml"], "scenario.yaml: "),
    ],
)
def test_what_is_wrong_is_said_before_anything_starts(
    comparing: Comparing, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Said, words: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert comparing(*words) == 1
    err = capsys.readouterr().err
    assert err.startswith("hvaqemu: ")
    assert said in err
    assert comparing.fleets.made == []


def test_a_signal_is_its_exit_code_and_leaves_what_was_played(
    comparing: Comparing, tmp_path: Path, capsys: Said
) -> None:
    def second(number: int, _fleet: StandInComparedFleet) -> None:
        if number == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    comparing.fleets.prepare = second
    assert comparing("--report", str(tmp_path / "report")) == 128 + signal.SIGTERM
    data = json.loads((tmp_path / "report" / "comparison.json").read_text())
    assert [run["outcome"] for run in data["runs"]] == ["ok", "interrupted"]
    assert "INTERRUPTED by SIGTERM" in capsys.readouterr().out


def test_a_bug_leaves_what_was_played_too(comparing: Comparing, tmp_path: Path, capsys: Said) -> None:
    def broken(number: int, _fleet: StandInComparedFleet) -> None:
        if number == 3:
            raise ZeroDivisionError("wrong")

    comparing.fleets.prepare = broken
    assert comparing("--json", str(tmp_path / "all.json")) == 2
    data = json.loads((tmp_path / "all.json").read_text())
    assert [run["outcome"] for run in data["runs"]] == ["ok", "ok", "ok"]
    assert (data["ok"], data["not_run"]) == (False, ["hva"])
    said = capsys.readouterr()
    assert "ended early: hva: a bug: ZeroDivisionError('wrong')" in said.out
    assert "this is a bug of hvaqemu" in said.err


def test_a_bug_before_the_first_is_only_a_bug(comparing: Comparing, tmp_path: Path, capsys: Said) -> None:
    def broken(_number: int, _fleet: StandInComparedFleet) -> None:
        raise ZeroDivisionError("wrong")

    comparing.fleets.prepare = broken
    assert comparing("--json", str(tmp_path / "all.json")) == 2
    assert not (tmp_path / "all.json").exists()
    assert "this is a bug of hvaqemu" in capsys.readouterr().err
