"""Comparisons on VMs that are none: each method does its own, a failure of one is a result, and all is shown."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from hva_host.agent.model import ExecResult
from hva_host.compare import method_fleet
from hva_host.compare.files import write_comparison
from hva_host.compare.method import Begin, Method
from hva_host.compare.model import ComparisonReport, GuestCounters, Probe
from hva_host.compare.rows import NOTHING, rows
from hva_host.compare.table import comparison_text
from hva_host.scenario.seam import PlayedVm
from hvaqemu.errors import ConfigError, LaunchError, PeerLost
from hvaqemu.scenario_config import Scenario
from hvaqemu.units import MiB
from tests.unit.compare_stand_ins import Fleets, StandInComparedFleet, StandInComparedVm, compare, without_waits
from tests.unit.scenario_stand_ins import Remembering
from tests.unit.test_scenario_player import a_scenario

STEPS: tuple[dict[str, Any], ...] = (
    {"guest": "x", "save": "a"},
    {"measure": "filled"},
    {"reclaim": {}},
    {"measure": "less"},
    {"restore": None},
    {"guest": "x", "save": "b"},
    {"same": ["a", "b"]},
    {"expect": {"measure": "less", "backing": {"max": "4G"}}},
)


@pytest.fixture(autouse=True)
def _no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    without_waits(monkeypatch)


async def compared(fleets: Fleets, *methods: Method, scenario: Scenario | None = None) -> ComparisonReport:
    return await compare(
        scenario or a_scenario(*STEPS),
        methods or tuple(Method),
        source=Path("some.yaml"),
        progress=Remembering(),
        fleet=fleets,
    )


def discards(vm: StandInComparedVm) -> list[str]:
    return [what for what in vm.log if what.split()[0] in ("reclaim", "start", "stop", "set", "restore", "balloon")]


async def test_each_method_does_its_own_and_nothing_else(tmp_path: Path) -> None:
    fleets = Fleets(tmp_path)
    report = await compared(fleets)
    assert report.ok, [run.report.failures for run in report.runs if run.report is not None]
    assert [run.method for run in report.runs] == list(Method)
    assert all(fleet.log == ["up vm", "down vm", "close"] for fleet in fleets.made)
    none, balloon, reporting, hva = (fleets.vm(number) for number in range(4))
    assert discards(hva) == ["reclaim unused,volatile None", "restore"]
    assert [discards(vm) for vm in (none, balloon, reporting)] == [[], [], []]
    assert none.qmp.sizes == reporting.qmp.sizes == hva.qmp.sizes == []
    # It shrank in steps, and had all of it back by `restore`.
    assert min(balloon.qmp.sizes) < 100 * MiB
    assert balloon.qmp.sizes[-1] == 512 * MiB
    assert all(run.guest for run in report.runs)
    assert all(run.first is not None and run.last is not None for run in report.runs)
    # The same step for all, whatever else is left out.
    assert {run.begin for run in report.runs} == {Begin(step=3, beside=False)}
    assert [run.left_out for run in report.runs] == [["expect less <= 4 GiB"]] * 3 + [[]]


async def test_under_a_policy_the_balloon_goes_on_all_the_time(tmp_path: Path) -> None:
    vm = {"name": "vm", "memory": "512M", "allow_exec": True, "reclaim": {"mode": "proactive"}}
    scenario = Scenario.model_validate({"vm": vm, "steps": [{"sleep": "1s"}]})
    fleets = Fleets(tmp_path)
    await compared(fleets, Method.BALLOON, Method.NONE, scenario=scenario)
    assert fleets.vm(0).qmp.size < 200 * MiB
    assert fleets.vm(1).qmp.sizes == []


async def test_a_policy_that_a_step_sets_is_a_balloon_from_then_on(tmp_path: Path) -> None:
    scenario = a_scenario({"sleep": "50ms"}, {"set": {"mode": "proactive"}}, {"sleep": "1s"})
    fleets = Fleets(tmp_path)
    report = await compared(fleets, Method.BALLOON, Method.NONE, Method.HVA, scenario=scenario)
    assert report.ok
    assert fleets.vm(0).qmp.size < 200 * MiB
    assert "set proactive" in fleets.vm(2).log
    assert not any("set" in what for number in (0, 1) for what in fleets.vm(number).log)


async def test_a_reclaim_beside_the_steps_is_a_balloon_beside_them(tmp_path: Path) -> None:
    stopped: list[int] = []

    async def command(line: str) -> ExecResult:
        if line == "less" and len(fleets.made) == 1:
            monitor = fleets.vm(0).qmp
            stopped.append(monitor.size)
            # From now on it would have more to spare.
            monitor.used = 5 * MiB
        return ExecResult(exit_status=0)

    scenario = a_scenario(
        {"reclaim": {"every": "1s"}}, {"sleep": "1s"}, {"reclaim": "stop"}, {"guest": "less"}, {"sleep": "100ms"}
    )
    fleets = Fleets(tmp_path, command)
    report = await compared(fleets, Method.BALLOON, Method.NONE, scenario=scenario)
    assert report.ok
    assert stopped[0] < 512 * MiB
    assert fleets.vm(0).qmp.sizes[-1] == stopped[0], "it went on after it was to stop"
    assert discards(fleets.vm(0)) == discards(fleets.vm(1)) == []


async def test_a_method_that_can_not_be_launched_is_a_result(tmp_path: Path) -> None:
    fleets = Fleets(tmp_path)
    fleets.prepare = lambda number, fleet: setattr(
        fleet, "launch_error", LaunchError("QEMU has no such property") if number == 1 else None
    )
    report = await compared(fleets, Method.NONE, Method.FREE_PAGE_REPORTING, Method.HVA)
    assert not report.ok
    assert [run.report is not None for run in report.runs] == [True, False, True]
    text = comparison_text(report)
    assert "could not be launched: QEMU has no such property" in text
    assert "FAILED" in text
    assert all(row.cells[1] == NOTHING for row in rows(report)[1:])


async def test_a_method_that_does_not_work_is_marked_and_fails_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def does_not(_vm: PlayedVm, _memory: int) -> Probe:
        return Probe(works=False, why="no page came back")

    monkeypatch.setattr(method_fleet, "probe", does_not)

    async def command(line: str) -> ExecResult:
        broken = len(fleets.made) == 1 and "vmstat" not in line
        return ExecResult(exit_status=1 if broken else 0, stdout=b"x")

    fleets = Fleets(tmp_path, command)
    report = await compared(fleets, Method.FREE_PAGE_REPORTING, Method.HVA)
    # It could not even do the work; that is no failure of a method that works.
    assert report.runs[0].report is not None
    assert report.runs[0].report.failures
    assert report.ok
    folder = tmp_path / "report"
    folder.mkdir()
    written = {path.name: path for path in write_comparison(report, folder)}
    assert set(written) == {"report.html", "comparison.json", "comparison.txt", "comparison.png"}
    text = written["comparison.txt"].read_text()
    assert "(free-page-reporting)" in text
    assert "free-page-reporting: not working on this guest: no page came back" in text
    assert "DONE" in text
    page = written["report.html"].read_text()
    assert "free-page-reporting (not working on this guest)" in page
    assert 'class="faint"' in page
    data = json.loads(written["comparison.json"].read_text())
    assert data["ok"] is True
    assert [run["outcome"] for run in data["runs"]] == ["not working", "ok"]
    assert data["runs"][1]["figures"]["memory"] == {"filled": 100 * MiB, "less": 100 * MiB}
    assert written["comparison.png"].read_bytes().startswith(b"\x89PNG")


async def test_what_the_guests_kernel_counts_is_counted_from_the_first_answer(tmp_path: Path) -> None:
    asked = 0

    async def command(line: str) -> ExecResult:
        nonlocal asked
        if "vmstat" not in line:
            return ExecResult(exit_status=0, stdout=b"x")
        asked += 1
        told = f"workingset_refault_file {asked * 100}\nworkingset_refault_anon {asked}\npgmajfault {asked * 7}\n"
        return ExecResult(exit_status=0, stdout=f"{told}oom_kill 2\n".encode())

    report = await compared(Fleets(tmp_path, command), Method.BALLOON)
    (run,) = report.runs
    assert run.counters == GuestCounters(refault_file=100, refault_anon=1, major_faults=7)
    assert run.oom_kills == 2
    # A guest with another kernel does not have all of them.
    (run,) = (await compared(Fleets(tmp_path), Method.BALLOON)).runs
    assert run.counters is None


async def test_what_the_probe_does_to_the_guest_is_not_the_methods(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def hungry(_vm: PlayedVm, _memory: int) -> Probe:
        fleets.vm(0).qmp.used = 512 * MiB
        await asyncio.sleep(0.1)
        return Probe(works=True, why="it does")

    monkeypatch.setattr(method_fleet, "probe", hungry)
    fleets = Fleets(tmp_path)
    scenario = a_scenario({"sleep": "1s"}, {"measure": "m"})
    (run,) = (await compared(fleets, Method.FREE_PAGE_REPORTING, scenario=scenario)).runs
    assert run.guest
    assert min(point.least_available_bytes or 0 for point in run.guest) == 452 * MiB


async def test_bytes_that_differ_under_one_method_fail_all_of_it(tmp_path: Path) -> None:
    outputs = iter(["1", "1", "1", "2"])

    async def command(line: str) -> ExecResult:
        return ExecResult(exit_status=0, stdout=(b"oom_kill 3\n" if "vmstat" in line else next(outputs).encode()))

    report = await compared(Fleets(tmp_path, command), Method.NONE, Method.BALLOON)
    assert not report.ok
    assert [run.ok for run in report.runs] == [True, False]
    assert [run.oom_kills for run in report.runs] == [3, 3]
    assert "balloon: b is not the same as a" in comparison_text(report)


async def test_a_guest_that_can_not_be_asked_is_refused(tmp_path: Path) -> None:
    scenario = Scenario.model_validate({"vm": {"name": "vm", "memory": "512M"}, "steps": [{"measure": "m"}]})
    with pytest.raises(ConfigError, match=r"some\.yaml: .*allow_exec: true"):
        await compared(Fleets(tmp_path), scenario=scenario)


async def test_a_balloon_of_which_nobody_hears_does_not_work(tmp_path: Path) -> None:
    def silent(_number: int, fleet: StandInComparedFleet) -> None:
        fleet.prepare = lambda vm: setattr(vm.qmp, "silent", True)

    fleets = Fleets(tmp_path)
    fleets.prepare = silent
    report = await compared(fleets, Method.BALLOON, Method.NONE, scenario=a_scenario({"measure": "m"}))
    assert [run.broken for run in report.runs] == ["its driver says nothing of its memory", ""]
    assert "(balloon)" in comparison_text(report)


async def test_a_bug_beside_the_steps_is_a_failure_of_the_run(tmp_path: Path) -> None:
    def wrong(_number: int, fleet: StandInComparedFleet) -> None:
        fleet.prepare = lambda vm: setattr(vm.qmp, "balloon_actual", None)

    fleets = Fleets(tmp_path)
    fleets.prepare = wrong
    scenario = a_scenario({"sleep": "1s"})
    report = await compared(fleets, Method.BALLOON, Method.NONE, scenario=scenario)
    assert [run.ok for run in report.runs] == [False, True]
    assert "a bug in following the guest's word: TypeError" in report.runs[0].failures[0]
    text = comparison_text(report)
    assert "balloon: a bug in following" in text
    assert "FAILED" in text


async def test_kills_that_nobody_answers_for_are_counted_in_the_console(tmp_path: Path) -> None:
    async def command(line: str) -> ExecResult:
        if "vmstat" in line:
            raise PeerLost("the guest agent hung up")
        return ExecResult(exit_status=0)

    def killing(_number: int, fleet: StandInComparedFleet) -> None:
        fleet.prepare = lambda vm: setattr(vm, "console_log", log)

    log = tmp_path / "killed.log"
    log.write_bytes(
        b"[ 7.1] Out of memory: Killed process 31 (python3) total-vm:90kB\n\xff\n"
        b"[ 8.1] Memory cgroup out of memory: Killed process 32 (x)\n[ 9.1] oom_reaper: reaped process 31\n"
    )
    fleets = Fleets(tmp_path, command)
    fleets.prepare = killing
    scenario = a_scenario({"measure": "m"})
    report = await compared(fleets, Method.NONE, scenario=scenario)
    shown = {row.name: row.cells for row in rows(report)}
    assert shown["OOM kills in the guest"] == ["at least 2"]
    log.write_bytes(b"booted\n")
    shown = {row.name: row.cells for row in rows(await compared(fleets, Method.NONE, scenario=scenario))}
    assert shown["OOM kills in the guest"] == [NOTHING]


async def test_min_resident_binds_the_balloon_where_it_binds_hva(tmp_path: Path) -> None:
    def roomy(_number: int, fleet: StandInComparedFleet) -> None:
        fleet.prepare = lambda vm: setattr(vm.qmp, "used", 40 * MiB)

    steps = [{"sleep": "1s"}, {"set": {"mode": "manual"}}, {"reclaim": {}}]
    vm = {"name": "vm", "memory": "512M", "allow_exec": True, "reclaim": {"mode": "proactive", "min_resident": "200M"}}
    fleets = Fleets(tmp_path)
    fleets.prepare = roomy
    await compared(fleets, Method.BALLOON, scenario=Scenario.model_validate({"vm": vm, "steps": steps[:1]}))
    assert fleets.vm(0).qmp.size == 200 * MiB
    # What a step asks for, policy's floor does not bind.
    await compared(fleets, Method.BALLOON, scenario=Scenario.model_validate({"vm": vm, "steps": steps}))
    assert fleets.vm(1).qmp.size < 60 * MiB
