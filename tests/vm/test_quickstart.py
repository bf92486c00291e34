"""The quickstart, as a user runs it: a real guest, through the command line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hva_host.cli.main import main
from hvaqemu.paths import runtime_dir, state_dir
from tests.vm.ordinary_user import why_no_user
from tests.vm.quickstart import EXAMPLE, holds_all_it_promises

pytestmark = pytest.mark.timeout(900)

SHORT = """\
vm: {name: short, memory: 256M, allow_exec: true, image: debian-s390x, boot_timeout: 240s}
steps:
  - measure: booted
  - guest: "echo started; sleep 300"
    timeout: 300s
"""


def leftovers() -> list[Path]:
    """Folders of VMs that should be gone."""
    return [path for place in (runtime_dir(), state_dir()) for path in (place / "vms").glob("*")]


def test_quickstart_holds_all_it_promises(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if not why_no_user():
        pytest.skip("test_privileges.py has an ordinary user run it")
    result, folder = tmp_path / "result.json", tmp_path / "report"
    code = main(["run", str(EXAMPLE), "--json", str(result), "--report", str(folder)])
    output = capsys.readouterr()
    assert code == 0, output.err
    assert "PASSED" in output.out
    holds_all_it_promises(result, folder)
    assert leftovers() == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_is_ended_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    scenario, result = tmp_path / "short.yaml", tmp_path / "result.json"
    scenario.write_text(SHORT)
    with subprocess.Popen(
        [sys.executable, "-m", "hva_host.cli.main", "run", str(scenario), "--json", str(result)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # A shell starts background jobs with SIGINT ignored; a terminal does not.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as process:
        try:
            assert process.stdout is not None
            lines = iter(process.stdout.readline, "")
            assert any("measure booted" in line for line in lines), "it ended before it had booted"
            os.kill(process.pid, number)
            code = process.wait(90)
        finally:
            process.kill()
    if number is signal.SIGKILL:
        # Nobody was left to clean up. The guest is gone all the same, and the next run of that name finds it so.
        assert code == -number
        scenario.write_text(SHORT.replace("sleep 300", "sleep 0"))
        assert main(["run", str(scenario)]) == 0
        assert leftovers() == []
        return
    report = json.loads(result.read_text())
    assert code == 128 + number
    assert report["interrupted"] == number.name
    assert set(report["measures"]) == {"booted"}
    assert [step["outcome"] for step in report["steps"]] == ["ok", "failed"]
    assert leftovers() == []
