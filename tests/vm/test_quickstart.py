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
from hvaqemu.units import MiB

pytestmark = [pytest.mark.vm, pytest.mark.timeout(900)]

EXAMPLES = Path(__file__).parents[2] / "examples"
SHORT = """\
vm: {name: short, memory: 256M, allow_exec: true, image: debian-s390x}
steps:
  - measure: booted
  - guest: "echo started; sleep 300"
    timeout: 300s
"""


def leftovers() -> list[Path]:
    """Folders of VMs that should be gone."""
    return [path for place in (runtime_dir(), state_dir()) for path in (place / "vms").glob("*")]


def test_quickstart_holds_all_it_promises(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result, folder = tmp_path / "result.json", tmp_path / "report"
    code = main(["run", str(EXAMPLES / "quickstart.yaml"), "--json", str(result), "--report", str(folder)])
    output = capsys.readouterr()
    report = json.loads(result.read_text())
    assert report["failures"] == []
    assert report["ok"] is True
    assert code == 0, output.err
    assert "PASSED" in output.out

    saved, measures = report["saved"], report["measures"]
    assert saved["before"] == saved["after"] == saved["finally"]
    assert len(saved["before"].split()[0]) == 32
    filled, reclaimed, reaccessed = measures["filled"], measures["reclaimed"], measures["reaccessed"]
    assert filled["backing_bytes"] >= 350 * MiB
    assert reclaimed["backing_bytes"] <= 0.17 * filled["backing_bytes"]
    # The guest was asked for nothing, and the bytes came back from the layer.
    assert abs(reclaimed["guest_free_bytes"] - filled["guest_free_bytes"]) < 32 * MiB
    assert reclaimed["layer_pages"] > 50_000
    assert reaccessed["refaults"] > reclaimed["refaults"]
    assert reaccessed["backing_bytes"] > 300 * MiB
    assert measures["ballooned"]["guest_free_bytes"] < 64 * MiB
    assert report["stalls"]["count"] > 0
    assert len(report["epochs"]) > 10
    assert all(
        epoch["candidates"] == epoch["discarded"] + epoch["touched"] + epoch["unmatched"] + epoch["unconfirmed"]
        for epoch in report["epochs"]
    )
    assert len(report["timeline"]) > 50
    assert (folder / "timeline.png").read_bytes().startswith(b"\x89PNG")
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
