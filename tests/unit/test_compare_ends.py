"""However a comparison ends, no VM is left behind, no other is started, and what was played by then is reported."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from hva_host.agent import plan
from hva_host.agent.condition import Listener
from hva_host.agent.model import ExecResult, Sample
from hva_host.compare import runner
from hva_host.compare.method import Method
from hva_host.compare.model import ComparisonReport
from hva_host.compare.runner import Comparison
from hva_host.compare.table import comparison_text
from hva_host.scenario.progress import Progress
from hvaqemu.errors import HostError, LaunchError, PeerLost
from hvaqemu.scenario_config import Scenario
from tests.unit.compare_stand_ins import Fleets, StandInComparedFleet, compare, without_waits
from tests.unit.scenario_stand_ins import Remembering
from tests.unit.test_scenario_player import a_scenario


@pytest.fixture(autouse=True)
def _no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    without_waits(monkeypatch)


def a_comparison(fleets: Fleets, scenario: Scenario | None = None) -> Comparison:
    return Comparison(
        scenario or a_scenario({"measure": "m"}), tuple(Method), source=Path("x"), progress=Remembering(), fleet=fleets
    )


async def compared(fleets: Fleets, scenario: Scenario | None = None) -> ComparisonReport:
    comparison = a_comparison(fleets, scenario)
    await comparison.play()
    return comparison.report()


async def test_an_interruption_ends_in_good_order_with_what_there_is(tmp_path: Path) -> None:
    began = asyncio.Event()

    async def command(line: str) -> ExecResult:
        if line == "wait" and len(fleets.made) == 2:
            began.set()
            await asyncio.sleep(60)
        return ExecResult(exit_status=0)

    fleets = Fleets(tmp_path, command)
    work = asyncio.create_task(compared(fleets, scenario=a_scenario({"measure": "m"}, {"guest": "wait"})))
    async with asyncio.timeout(10):
        await began.wait()
        os.kill(os.getpid(), signal.SIGINT)
        report = await work
    assert report.interrupted == "SIGINT"
    assert not report.ok
    assert [run.method for run in report.runs] == [Method.NONE, Method.BALLOON]
    assert report.not_run == [Method.FREE_PAGE_REPORTING, Method.HVA]
    assert len(fleets.made) == 2
    assert fleets.made[1].log == ["up vm", "down vm", "close"]
    text = comparison_text(report)
    assert "INTERRUPTED by SIGINT" in text
    assert "not come to: free-page-reporting, hva" in text


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
async def test_a_signal_between_the_runs_keeps_what_was_played(tmp_path: Path, number: signal.Signals) -> None:
    fleets = Fleets(tmp_path)

    def second(made: int, _fleet: StandInComparedFleet) -> None:
        if made == 1:
            os.kill(os.getpid(), number)

    fleets.prepare = second
    report = await compared(fleets)
    assert report.interrupted == number.name
    assert report.runs[0].ok
    assert not report.ok
    assert len(fleets.made) == 2
    assert report.not_run[-1] is Method.HVA


async def test_a_signal_while_the_image_is_read_ends_it_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[bool] = []
    ended, loop = asyncio.Event(), asyncio.get_running_loop()

    def reading(_scenario: Scenario, _progress: Progress, enough: threading.Event) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        told.append(enough.wait(10))
        loop.call_soon_threadsafe(ended.set)

    monkeypatch.undo()
    monkeypatch.setattr(runner, "_read_image", reading)
    fleets = Fleets(tmp_path)
    report = await compared(fleets)
    assert report.interrupted == "SIGTERM"
    assert report.not_run == list(Method)
    assert fleets.made == []
    async with asyncio.timeout(5):
        await ended.wait()
    assert told == [True], "the thread was not told"


async def test_a_signal_while_a_launch_that_failed_is_cleaned_up_starts_no_other(tmp_path: Path) -> None:
    class Slow(StandInComparedFleet):
        async def close(self) -> None:
            os.kill(os.getpid(), signal.SIGINT)
            await asyncio.sleep(0.1)
            await super().close()

    made: list[Slow] = []

    def fleet(_tell: Listener) -> Slow:
        made.append(Slow(tmp_path))
        made[-1].launch_error = LaunchError("no")
        return made[-1]

    async with asyncio.timeout(10):
        report = await compare(
            a_scenario({"measure": "m"}), tuple(Method), source=Path("x"), progress=Remembering(), fleet=fleet
        )
    assert report.interrupted == "SIGINT"
    assert [each.log for each in made] == [["up vm", "close"]]


async def test_where_a_vm_could_not_be_ended_no_other_is_started(tmp_path: Path) -> None:
    fleets = Fleets(tmp_path)
    fleets.prepare = lambda number, fleet: setattr(fleet, "down_error", HostError("stuck") if number == 1 else None)
    report = await compared(fleets)
    assert len(fleets.made) == 2
    assert report.not_run == [Method.FREE_PAGE_REPORTING, Method.HVA]
    assert not report.ok
    text = comparison_text(report)
    assert "ended early: balloon: its VM vm could not be ended, and has the name" in text
    assert "FAILED: the comparison could not go on" in text


@pytest.mark.parametrize("ends", [True, False])
async def test_a_vm_that_can_not_be_followed_is_ended_at_once(tmp_path: Path, ends: bool) -> None:
    async def no_sample() -> Sample:
        raise PeerLost("the pager hung up")

    def gone(number: int, fleet: StandInComparedFleet) -> None:
        fleet.prepare = lambda vm: setattr(vm, "sample", no_sample) if number == 0 else None
        fleet.down_error = None if ends else HostError("stuck")

    fleets = Fleets(tmp_path)
    fleets.prepare = gone
    report = await compared(fleets)
    assert fleets.made[0].log == ["up vm", "down vm", "close"]
    assert report.runs[0].error == "the pager hung up"
    assert len(report.runs) == (len(Method) if ends else 1)


async def test_a_bug_under_one_method_leaves_the_runs_before_it(tmp_path: Path) -> None:
    def broken(number: int, _fleet: StandInComparedFleet) -> None:
        if number == 2:
            raise ZeroDivisionError("a bug")

    fleets = Fleets(tmp_path)
    fleets.prepare = broken
    comparison = Comparison(
        a_scenario({"measure": "m"}), tuple(Method), source=Path("x"), progress=Remembering(), fleet=fleets
    )
    with pytest.raises(ZeroDivisionError):
        await comparison.play()
    report = comparison.report()
    assert [run.ok for run in report.runs] == [True, True]
    assert report.not_run == [Method.FREE_PAGE_REPORTING, Method.HVA]
    assert "free-page-reporting: a bug: ZeroDivisionError('a bug')" in report.stopped
    assert not report.ok


async def test_an_image_that_can_not_be_read_is_the_hosts_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(plan, "image_of", lambda _config, _progress: SimpleNamespace(root=tmp_path))
    with pytest.raises(HostError, match=f"{tmp_path}: Is a directory"):
        await compared(Fleets(tmp_path))
