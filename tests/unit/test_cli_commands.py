"""Subcommands against a control socket on a fleet without QEMU."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest

from hva_host.agent.model import ExecResult, HeldPages, Measure, VmState, VmStatus
from hva_host.cli.main import main
from hvaqemu.protocol import STDIN_BYTES_MAX
from tests.unit.control_stand_ins import Agent, StandInVm

_VM = """\
name: {name}
memory: {memory}
image: nowhere/image.yaml
"""


Said = pytest.CaptureFixture[bytes]


def test_ls_and_status_show_what_json_says(agent: Agent, capsysbinary: Said) -> None:
    assert main(["ls"]) == 0
    assert b"no VM is running" in capsysbinary.readouterr().out
    agent.add("one")
    agent.add("two")
    assert main(["ls", "--json"]) == 0
    vms = [VmStatus.model_validate(each) for each in json.loads(capsysbinary.readouterr().out)]
    assert [vm.name for vm in vms] == ["one", "two"]
    assert main(["ls"]) == 0
    lines = capsysbinary.readouterr().out.decode().splitlines()
    assert lines[0].split()[:3] == ["NAME", "STATE", "PROCESS"]
    assert [line.split()[:3] for line in lines[1:]] == [["one", "running", "4321"], ["two", "running", "4321"]]
    assert "96.0 MiB" in lines[1]
    assert main(["status", "one", "--json"]) == 0
    status = json.loads(capsysbinary.readouterr().out)
    assert set(status["measure"]) == set(Measure.model_fields)
    assert status["epochs"][0]["discarded"] == 100
    assert main(["status", "one"]) == 0
    text = capsysbinary.readouterr().out.decode()
    for part in ("running", "6.1.0-s390x", "96.0 MiB", "2.0 MiB from layers", "unknown", "EPOCH"):
        assert part in text


def test_report_writes_a_page_and_prints_where(
    agent: Agent, capsysbinary: Said, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent.add("one", lambda vm: setattr(vm, "kernel", "<b>6.1"))
    monkeypatch.chdir(tmp_path)
    assert main(["report", "one"]) == 0
    assert capsysbinary.readouterr().out == b"one.html\n"
    text = (tmp_path / "one.html").read_text()
    assert (tmp_path / "one.html").stat().st_mode & 0o777 == 0o600
    assert "&lt;b&gt;6.1" in text
    assert "from at most 100.0 MiB to 100.0 MiB" in text
    assert main(["report", "one", "-o", str(tmp_path / "missing" / "x.html")]) == 1
    assert b"missing/x.html: No such file or directory" in capsysbinary.readouterr().err


def test_an_unknown_vm_is_1_and_one_line(agent: Agent, capsysbinary: Said) -> None:
    for command in ("status", "down", "reclaim", "freeze", "merge", "restore", "resume", "console"):
        assert main([command, "nobody"]) == 1
        said = capsysbinary.readouterr()
        assert said.out == b""
        assert said.err == b"hvaqemu: VM nobody: no such VM (known: none is running)\n"


def _held(vm: StandInVm) -> None:
    vm.state, vm.reason = VmState.HELD, "base.raw has changed"
    vm.held = [HeldPages(layer="base.raw", pages=[1, 2, 3], reason="base.raw has changed")]
    vm.kernel = "\x1b[2J[red]6.1\u202e"


def _panicked(vm: StandInVm) -> None:
    vm.state, vm.reason = VmState.PANICKED, "the guest's kernel panicked: \x1b[2Joops"


def _not_reclaimed(vm: StandInVm) -> None:
    vm.refused = "layer base.raw: process 7 (\x1b[2Jdd) has it open for writing"


def _gone(vm: StandInVm) -> None:
    vm.state, vm.reason = VmState.GONE, "guest-shutdown: QEMU exited with status 0"


def test_a_vm_that_needs_its_operator_is_loud(agent: Agent, capsysbinary: Said) -> None:
    agent.add("bad", _held)
    agent.add("fine", _not_reclaimed)
    agent.add("gone", _gone)
    assert main(["status", "fine"]) == 0
    assert main(["status", "gone"]) == 0
    agent.add("worse", _panicked)
    capsysbinary.readouterr()
    assert main(["ls"]) == 1
    said = capsysbinary.readouterr()
    text = said.out.decode()
    assert "HELD" in text
    assert "base.raw has changed" in text
    assert "`hvaqemu resume bad`" in text
    assert "PANICKED" in text
    assert "GONE" in text
    assert "fine: not reclaimed: layer base.raw: process 7 (\\x1b[2Jdd) has it open" in text
    line = said.err.decode()
    assert line.startswith("hvaqemu: VM bad: HELD, ")
    assert "VM worse: PANICKED" in line
    assert "gone" not in line
    assert line.count("\n") == 1
    assert main(["ls", "--json"]) == 1
    said = capsysbinary.readouterr()
    assert [vm["state"] for vm in json.loads(said.out)] == ["held", "running", "gone", "panicked"]
    assert said.err.decode() == line
    assert main(["status", "bad", "--json"]) == 1
    said = capsysbinary.readouterr()
    assert json.loads(said.out)["held"][0]["pages"] == [1, 2, 3]
    assert said.err.count(b"\n") == 1
    assert main(["status", "bad"]) == 1
    said = capsysbinary.readouterr()
    text += said.out.decode()
    assert text.count("HELD") >= 4
    assert "held: base.raw: base.raw has changed; pages 1, 2, 3" in text
    assert "[red]6.1" in text
    text += said.err.decode() + line
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert main(["resume", "bad"]) == 1
    assert b"3 pages are still held" in capsysbinary.readouterr().err


def test_freeze_and_merge(agent: Agent, capsysbinary: Said) -> None:
    vm = agent.add("one")
    assert main(["freeze", "one", "root"]) == 0
    said = capsysbinary.readouterr()
    assert said.out == b"one: disk root frozen: 4.0 MiB, in 100.0 ms, indexed in 200.0 ms\n"
    assert b"1.0 MiB of 4.0 MiB indexed" in said.err
    assert main(["freeze", "one", "--json"]) == 0
    assert json.loads(capsysbinary.readouterr().out)[0]["layer"] == "/s/root.qcow2"
    vm.nothing_written = True
    assert main(["freeze", "one", "root"]) == 0
    said = capsysbinary.readouterr()
    assert said.out == b"one: disk root not frozen: nothing was written to it since the last time\n"
    assert main(["freeze", "one", "--json"]) == 0
    assert json.loads(capsysbinary.readouterr().out)[0]["layer"] is None
    assert main(["merge", "one"]) == 0
    said = capsysbinary.readouterr()
    assert said.out == b"one: 1 frozen file merged away\n"
    assert b"1.0 MiB of 4.0 MiB merged" in said.err
    assert vm.asked == [*2 * [("freeze", "root"), ("freeze", None)], ("merge", None)]


def test_reclaim_restore_resume_down(agent: Agent, capsysbinary: Said) -> None:
    vm = agent.add("one")
    assert main(["reclaim", "one", "--states", "unused", "--epochs", "2"]) == 0
    said = capsysbinary.readouterr()
    assert vm.asked == [(("unused",), 2)]
    assert b"backing 200.0 MiB -> 100.0 MiB; 150 pages discarded in 2 epochs" in said.out
    assert said.err.count(b"epoch ") == 2
    assert main(["reclaim", "one", "--json"]) == 0
    assert json.loads(capsysbinary.readouterr().out)["discarded"] == 150
    assert vm.asked[-1] == (("unused", "volatile"), None)
    assert main(["reclaim", "one", "--states", "unused,precious"]) == 1
    assert b"'precious' is not a page state" in capsysbinary.readouterr().err
    assert main(["restore", "one"]) == 0
    assert b"768 pages (3.0 MiB)" in capsysbinary.readouterr().out
    assert main(["resume", "one", "--json"]) == 0
    assert json.loads(capsysbinary.readouterr().out) == {"held": 0}
    assert main(["down", "one"]) == 0
    assert agent.names == []


@pytest.mark.parametrize(
    ("result", "code", "says"),
    [
        (ExecResult(exit_status=0), 0, b""),
        (ExecResult(exit_status=255), 255, b""),
        (ExecResult(exit_status=7, stderr=b"oh\n"), 7, b"oh\n"),
        (ExecResult(exit_status=None, signal=9), 137, b"signal 9"),
        (ExecResult(exit_status=None, signal=9, timed_out=True), 124, b"not done after 60.0 s"),
        (ExecResult(exit_status=0, truncated=True), 0, b"is lost"),
    ],
)
def test_the_guests_exit_status_is_ours(
    agent: Agent, capsysbinary: Said, result: ExecResult, code: int, says: bytes
) -> None:
    agent.add("one", lambda vm: setattr(vm, "answer", result), allow_exec=True)
    assert main(["exec", "one", "--", "job"]) == code
    said = capsysbinary.readouterr().err
    assert says in said
    assert bool(said) == bool(says)


def test_exec_passes_words_and_bytes_through(agent: Agent, capsysbinary: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = bytes(range(256))
    vm = agent.add("one", lambda vm: setattr(vm, "answer", ExecResult(exit_status=0, stdout=raw)), allow_exec=True)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw)))
    assert main(["exec", "one", "--timeout", "2m", "--stdin", "--", "sh", "-c", "a b", "--", "--json"]) == 0
    assert capsysbinary.readouterr().out == raw
    assert vm.asked == [(("sh", "-c", "a b", "--", "--json"), 120.0, raw)]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(bytes(STDIN_BYTES_MAX + 1))))
    assert main(["exec", "one", "--stdin", "--", "cat"]) == 1
    assert b"standard input: more than 65536 bytes" in capsysbinary.readouterr().err
    agent.add("closed")
    assert main(["exec", "closed", "--", "ls"]) == 1
    assert b"commands in the guest are off" in capsysbinary.readouterr().err
    assert main(["exec", "one", "--", "bug"]) == 2
    assert b"ZeroDivisionError" in capsysbinary.readouterr().err


def test_qmp_prints_what_qemu_returns_as_ascii(agent: Agent, capsysbinary: Said) -> None:
    vm = agent.add("one")
    assert main(["qmp", "one", "query-status", "--arguments", '{"a": [1]}', "--timeout", "2m"]) == 0
    printed = capsysbinary.readouterr().out
    assert printed.isascii()
    assert b"\x9b" not in printed
    assert json.loads(printed) == [{"said": "na\u00efve \x9b31m"}]
    assert vm.asked[-1] == ("query-status", {"a": [1]}, 120.0)
    assert main(["qmp", "one", "migrate-incoming"]) == 1
    assert b"it would not be safe (do something else)" in capsysbinary.readouterr().err
    for wrong in ("{", "[1]"):
        with pytest.raises(SystemExit) as ended:
            main(["qmp", "one", "stop", "--arguments", wrong])
        assert ended.value.code == 2


def test_console_is_raw_only_into_a_pipe(agent: Agent, capsysbinary: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    vm = agent.add("one", lambda vm: setattr(vm, "state", VmState.GONE))
    assert main(["console", "one"]) == 1
    assert b"No such file" in capsysbinary.readouterr().err
    vm.console_log.write_bytes(b"\x1b[2Jbooting\r\n\xff")
    for follow in ([], ["--follow"]):
        assert main(["console", "one", *follow]) == 0
        assert capsysbinary.readouterr().out == b"\x1b[2Jbooting\r\n\xff"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert main(["console", "one"]) == 0
    assert capsysbinary.readouterr().out == b"\\x1b[2Jbooting\n\\xff"


def test_up_sends_the_file_with_absolute_paths(agent: Agent, capsysbinary: Said, tmp_path: Path) -> None:
    file = tmp_path / "vm.yaml"
    file.write_text(_VM.format(name="one", memory="256M"))
    assert main(["up", str(file), "--timeout", "3s"]) == 0
    said = capsysbinary.readouterr().err.decode()
    assert said.splitlines() == ["starting QEMU", "one is up, process 4321: 6.1.0-s390x"]
    assert main(["up", str(file), "--json"]) == 1
    assert capsysbinary.readouterr().err == b"hvaqemu: VM one: the name is taken (choose another)\n"
    vm = agent._served.fleet.machines["one"]
    assert vm.config.image == str(tmp_path / "nowhere/image.yaml")
    assert vm.config.boot_timeout == 3.0


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("name: one\nmemory: 512M\nflavour: sweet\n", ":3: "),
        ("name: one\nmemory: 3M\n", "memory"),
        ("name: [one\n", "vm.yaml:"),
        ("name: one\n", "memory"),
    ],
)
@pytest.mark.parametrize("command", [["up"], ["up", "--dry-run"]])
def test_a_wrong_file_is_one_line_and_asks_nobody(
    capsysbinary: Said, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, says: str, command: list[str]
) -> None:
    monkeypatch.setenv("HVAQEMU_RUNTIME_DIR", str(tmp_path / "none"))
    file = tmp_path / "vm.yaml"
    file.write_text(text)
    assert main([*command, str(file)]) == 1
    said = capsysbinary.readouterr().err.decode()
    assert said.count("\n") == 1
    assert said.startswith(f"hvaqemu: {file}")
    assert says in said
    assert not (tmp_path / "none").exists()


def test_run_looks_before_it_starts(capsysbinary: Said, tmp_path: Path) -> None:
    file = tmp_path / "scenario.yaml"
    assert main(["run", str(file)]) == 1
    assert b"No such file" in capsysbinary.readouterr().err
    file.write_text("vm: {name: one, memory: 512M}\nsteps:\n  - measure: filled\n")
    assert main(["run", str(file), "--json", str(tmp_path / "none" / "report.json")]) == 1
    assert b"not there or not writable" in capsysbinary.readouterr().err
