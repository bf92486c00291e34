"""Fault points: off unless asked for, once for each file, and never by mistake."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

_REACH = """
import sys
from hvaqemu.faultpoints import reach
for name in sys.argv[1:]:
    try:
        reach(name)
    except OSError as error:
        print(error.errno, error.strerror)
print("went on")
"""


def reach(*names: str, fault: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "HVAQEMU_FAULT"}
    if fault is not None:
        environment["HVAQEMU_FAULT"] = fault
    return subprocess.run(
        [sys.executable, "-c", _REACH, *names], env=environment, capture_output=True, text=True, timeout=30
    )


def test_off_unless_the_environment_names_them() -> None:
    assert reach("a", "b").stdout == "went on\n"
    assert reach("a", "b", fault="c:kill,ab:kill").stdout == "went on\n"


def test_a_process_kills_itself() -> None:
    done = reach("a", "b", fault="b:kill")
    assert (done.returncode, done.stdout) == (-signal.SIGKILL, "")


def test_an_error_is_raised_each_time() -> None:
    assert reach("a", "b", "b", fault="b:ENOSPC").stdout.splitlines() == [
        *["28 No space left on device (at fault point b)"] * 2,
        "went on",
    ]


def test_with_a_file_it_happens_once(tmp_path: Path) -> None:
    file = tmp_path / "armed"
    assert reach("a", fault=f"a:kill:{file}").stdout == "went on\n"
    file.touch()
    assert reach("b", fault=f"a:kill:{file}").stdout == "went on\n"
    assert reach("a", fault=f"a:kill:{file}").returncode == -signal.SIGKILL
    assert not file.exists()
    assert reach("a", fault=f"a:kill:{file}").stdout == "went on\n"


def test_an_action_that_is_none_is_told() -> None:
    assert "unknown action 'murder'" in reach("a", fault="a:murder").stderr
