"""Runs on a fleet that is none: whatever happens, the VM is shut down and what there is gets reported."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from hva_host.agent.model import ExecResult
from hva_host.report.files import JSON_FILE, PAGE_FILE, PICTURE_FILE, TEXT_FILE
from hva_host.report.model import Outcome, ScenarioReport
from hva_host.scenario.runner import run_scenario
from hvaqemu.errors import ConfigError, DeadlineExceeded, HostError, HvaError
from hvaqemu.scenario_config import Scenario
from tests.unit.scenario_stand_ins import Remembering, StandInFleet, StandInVm
from tests.unit.test_scenario_player import a_scenario


async def run(
    fleet: StandInFleet, *steps: dict[str, Any], keep: bool = False, report_dir: Path | None = None
) -> ScenarioReport:
    scenario: Scenario = a_scenario(*steps)
    return await run_scenario(
        scenario, source=Path("some.yaml"), report_dir=report_dir, keep=keep, progress=Remembering(), fleet=fleet
    )


SHUT_DOWN = ["up vm", "down vm begins", "down vm", "close"]


def forever(began: asyncio.Event) -> Any:
    async def command(_line: str) -> ExecResult:
        began.set()
        await asyncio.sleep(60)
        raise AssertionError("nobody cancelled us")

    return command


async def test_a_good_run(tmp_path: Path) -> None:
    fleet = StandInFleet(tmp_path)
    report = await run(fleet, {"guest": "x", "save": "a"}, {"measure": "m"}, {"reclaim": {}})
    assert report.ok
    assert report.failures == []
    assert fleet.log == SHUT_DOWN
    assert report.saved == {"a": "x"}
    assert set(report.measures) == {"m"}
    assert len(report.epochs) == 2
    assert report.stalls.count == 7
    assert report.ended == "the guest shut down"
    assert report.configuration["source"] == "some.yaml"
    assert Scenario.model_validate(report.configuration["scenario"]).vm.name == "vm"
    assert {"hvaqemu", "Python", "host kernel", "guest kernel"} <= set(report.versions)
    assert report.versions["guest kernel"] == r"6.1.0 \x1b[31m"
    assert report.console_tail == []
    # Steps and samples share one clock, which began before the VM was ours.
    assert report.timeline[0].at_s >= 10
    assert all(step.at_s is not None and step.at_s >= 10 for step in report.steps)


async def test_a_failed_step_shuts_down_and_shows_the_console(tmp_path: Path) -> None:
    async def command(_line: str) -> ExecResult:
        return ExecResult(exit_status=1)

    fleet = StandInFleet(tmp_path, command)
    report = await run(fleet, {"guest": "x"}, {"measure": "m"})
    assert not report.ok
    assert fleet.log == SHUT_DOWN
    assert report.console_tail == ["booted", r"\x1b[31mOops"]


async def test_a_vm_that_dies_is_reported(tmp_path: Path) -> None:
    fleet = StandInFleet(tmp_path)
    fleet.prepare = lambda vm: vm.failure.set_result("QEMU was killed by SIGKILL")
    report = await run(fleet, {"sleep": "1m"}, {"measure": "m"})
    assert any("killed by SIGKILL" in failure for failure in report.failures)
    assert fleet.log == SHUT_DOWN


async def test_a_failed_launch_is_raised(tmp_path: Path) -> None:
    fleet = StandInFleet(tmp_path)
    fleet.launch_error = ConfigError("VM vm: the name is taken")
    with pytest.raises(ConfigError, match="taken"):
        await run(fleet, {"measure": "m"})
    assert fleet.log == ["up vm", "close"]


async def test_a_bug_shuts_down_too(tmp_path: Path) -> None:
    fleet = StandInFleet(tmp_path)
    fleet.prepare = lambda vm: vm.errors.update(measure=KeyError("a bug"))
    with pytest.raises(KeyError):
        await run(fleet, {"measure": "m"})
    assert fleet.log == SHUT_DOWN


async def test_keep_leaves_the_vm(tmp_path: Path) -> None:
    fleet = StandInFleet(tmp_path)
    report = await run(fleet, {"measure": "m"}, keep=True)
    assert report.ok
    assert fleet.log == ["up vm", "close"]
    assert report.ended == "kept"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
async def test_a_signal_ends_the_run_in_good_order(tmp_path: Path, number: signal.Signals) -> None:
    began = asyncio.Event()
    fleet = StandInFleet(tmp_path, forever(began))
    before = signal.getsignal(number)
    work = asyncio.create_task(run(fleet, {"measure": "m"}, {"guest": "x"}, {"restore": {}}))
    await began.wait()
    os.kill(os.getpid(), number)
    await fleet.ending.wait()
    # The impatient send a second one; the clean-up is not cut short.
    os.kill(os.getpid(), number)
    report = await work
    assert fleet.log == SHUT_DOWN
    assert report.interrupted == number.name
    assert report.failures[0] == f"interrupted by {number.name}"
    assert [step.outcome for step in report.steps] == [Outcome.OK, Outcome.FAILED, Outcome.NOT_RUN]
    assert set(report.measures) == {"m"}
    assert signal.getsignal(number) == before


async def test_cancelling_twice_still_shuts_down(tmp_path: Path) -> None:
    began = asyncio.Event()
    fleet = StandInFleet(tmp_path, forever(began))
    work = asyncio.create_task(run(fleet, {"guest": "x"}))
    await began.wait()
    work.cancel()
    await fleet.ending.wait()
    work.cancel()
    with pytest.raises(asyncio.CancelledError):
        await work
    assert fleet.log == SHUT_DOWN


async def test_a_signal_while_launching(tmp_path: Path) -> None:
    class Slow(StandInFleet):
        async def up(self, config: Any, progress: Any) -> StandInVm:
            self.log.append("up vm")
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.sleep(60)
            raise AssertionError("nobody cancelled us")

    fleet = Slow(tmp_path)
    report = await run(fleet, {"measure": "m"})
    assert fleet.log == ["up vm", "close"]
    assert report.interrupted == "SIGTERM"
    assert not report.ok


async def test_a_vm_that_can_not_be_ended_is_a_failure(tmp_path: Path) -> None:
    class Stuck(StandInFleet):
        async def down(self, name: str) -> str:
            raise DeadlineExceeded("QEMU, process 1, still runs after 20 s")

    fleet = Stuck(tmp_path)
    report = await run(fleet, {"measure": "m"})
    assert report.failures == ["shutting vm down: QEMU, process 1, still runs after 20 s"]
    assert fleet.log == ["up vm", "close"]


async def test_report_files_are_written_and_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "report"
    for _ in range(2):
        await run(StandInFleet(tmp_path), {"measure": "m"}, {"sleep": "400ms"}, report_dir=folder)
    assert sorted(path.name for path in folder.iterdir()) == sorted([JSON_FILE, TEXT_FILE, PAGE_FILE, PICTURE_FILE])


async def test_a_report_folder_that_can_not_be_is_said_before_the_launch(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    fleet = StandInFleet(tmp_path)
    with pytest.raises(HostError, match="report"):
        await run(fleet, {"measure": "m"}, report_dir=tmp_path / "file" / "report")
    assert fleet.log == []


async def test_samples_that_fail_leave_a_gap_only(tmp_path: Path) -> None:
    class Blind(StandInVm):
        async def sample(self) -> Any:
            raise HvaError("no")

    class Fleet(StandInFleet):
        async def up(self, config: Any, progress: Any) -> StandInVm:
            self.log.append("up vm")
            return Blind(tmp_path)

    report = await run(Fleet(tmp_path), {"measure": "m"})
    assert report.ok
    assert report.timeline == []
