from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from hva_host.cli import down, main
from hva_host.cli.main import _COMMANDS, _split
from hvaqemu.errors import HostError

_RUN = (sys.executable, "-m", "hva_host.cli.main")


def _raising(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> int:
    def run(_options: object) -> int:
        raise error

    monkeypatch.setattr(down, "run", run)
    return main.main(["down", "one"])


def test_an_expected_error_is_one_harmless_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = _raising(monkeypatch, HostError("no room\n\x1b[2Jat all", "make room"))
    said = capsys.readouterr()
    assert (code, said.out) == (1, "")
    assert said.err == "hvaqemu: no room | \\x1b[2Jat all (make room)\n"


def test_a_bug_is_a_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert _raising(monkeypatch, ZeroDivisionError("of ours")) == 2
    said = capsys.readouterr().err
    assert "Traceback" in said
    assert "ZeroDivisionError: of ours" in said


def test_ctrl_c_is_130_without_a_word(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert _raising(monkeypatch, KeyboardInterrupt()) == 130
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("argv", "before", "after"),
    [
        (["exec", "one", "--", "sh", "-c", "x", "--", "-y"], ["exec", "one"], ["sh", "-c", "x", "--", "-y"]),
        (["exec", "one", "--timeout", "5s", "--", "--json"], ["exec", "one", "--timeout", "5s"], ["--json"]),
        (["exec", "one", "ls"], ["exec", "one", "ls"], []),
        (["down", "--", "one"], ["down", "--", "one"], []),
        ([], [], []),
    ],
)
def test_what_follows_the_dashes_is_the_guests(argv: list[str], before: list[str], after: list[str]) -> None:
    assert _split(argv) == (before, after)


@pytest.mark.parametrize("words", [[name] for name in _COMMANDS] + [["image", "build"], ["image", "list"]])
def test_help_explains_and_shows_an_example(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main.main([*words, "--help"])
    said = capsys.readouterr().out
    assert ended.value.code == 0
    assert "example" in said
    assert f"hvaqemu {' '.join(words)}" in said.partition("example")[2]
    assert max(map(len, said.splitlines())) <= 110


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["fly"],
        ["down"],
        ["exec", "one"],
        ["exec", "one", "--"],
        ["exec", "one", "--timeout", "soon", "--", "ls"],
        ["exec", "one", "--timeout", "0", "--", "ls"],
        ["reclaim", "one", "--epochs", "0"],
        ["reclaim", "one", "--epochs", "\u0663"],
        ["agent", "--stop", "--background"],
    ],
)
def test_wrong_usage_is_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main.main(argv)
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("usage: hvaqemu")


def test_help_loads_nothing_heavy() -> None:
    program = (
        "import sys; from hva_host.cli.main import _parser; _parser().format_help(); "
        "print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    heavy = {"asyncio", "pydantic", "numpy", "matplotlib", "rich", "yaml", "qemu", "logging", "hva_images", "ctypes"}
    assert not heavy & set(done.stdout.split())


def test_a_reader_that_has_seen_enough_is_no_bug(tmp_path: Path) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    done = subprocess.run(
        [*_RUN, "image", "list"],
        stdout=write_end,
        stderr=subprocess.PIPE,
        env={**os.environ, "HVAQEMU_CACHE_DIR": str(tmp_path / "cache")},
        timeout=60,
    )
    os.close(write_end)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, b"")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_let_it_clean_up(number: signal.Signals) -> None:
    program = textwrap.dedent(
        """
        import asyncio, sys
        from hva_host.cli import down, main
        from hva_host.cli.loop import run_async

        async def work():
            try:
                print("working", flush=True)
                await asyncio.sleep(60)
            finally:
                await asyncio.sleep(0.05)
                print("cleaned up", flush=True)

        down.run = lambda options: run_async(work())
        sys.exit(main.main(["down", "one"]))
        """
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == b"working\n"
        process.send_signal(number)
        assert process.stdout.read() == b"cleaned up\n"
        assert process.stderr.read() == b""
        assert process.wait(30) == 128 + number
