"""Steps on a VM that is none: what ends a scenario, what is only noted, what is kept."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from hva_host.agent.model import ExecResult, Measure
from hva_host.report.model import Outcome
from hva_host.scenario import player as player_module
from hva_host.scenario.player import Player
from hvaqemu.errors import PeerLost, RefusedError
from hvaqemu.scenario_config import Scenario
from hvaqemu.units import MiB
from tests.unit.scenario_stand_ins import Remembering, StandInVm


def a_scenario(*steps: dict[str, Any]) -> Scenario:
    vm = {"name": "vm", "memory": "512M", "allow_exec": True}
    return Scenario.model_validate({"vm": vm, "steps": list(steps)})


async def played(vm: StandInVm, *steps: dict[str, Any]) -> Player:
    player = Player(vm, a_scenario(*steps), Remembering(), lambda: 0.0)
    await player.play()
    assert [step.number for step in player.steps] == list(range(1, len(steps) + 1))
    return player


def outcomes(player: Player) -> list[Outcome]:
    return [step.outcome for step in player.steps]


async def test_all_verbs_reach_the_vm_in_order(tmp_path: Path) -> None:
    vm = StandInVm(tmp_path)
    vm.backing = [400 * MiB, 50 * MiB]
    player = await played(
        vm,
        {"guest": "one", "save": "a"},
        {"measure": "filled"},
        {"reclaim": {"states": ["unused"], "epochs": 3}},
        {"measure": "less"},
        {"reclaim": {"every": "200ms"}},
        {"sleep": "1ms"},
        {"reclaim": "stop"},
        {"set": {"mode": "proactive", "refault_budget": "1%/min"}},
        {"restore": None},
        {"balloon": "128M"},
        {"guest": "one", "save": "b"},
        {"same": ["a", "b"]},
        {"expect": {"measure": "less", "backing": {"max": "60M", "of": "filled", "max_ratio": 0.2}}},
    )
    assert player.failures == []
    assert outcomes(player) == [Outcome.OK] * 13
    assert vm.log == [
        "guest one",
        "measure",
        "reclaim unused 3",
        "measure",
        "start unused,volatile 0.2",
        "stop",
        "set proactive",
        "restore",
        "balloon 128",
        "guest one",
    ]
    assert player.saved == {"a": "one", "b": "one"}
    assert player.measures["filled"].backing_bytes == 400 * MiB
    assert [epoch.number for epoch in player.epochs] == [1, 2, 3, 9]


async def test_failed_checks_are_collected_and_the_rest_is_played(tmp_path: Path) -> None:
    player = await played(
        StandInVm(tmp_path),
        {"guest": "one", "save": "a"},
        {"guest": "two", "save": "b"},
        {"same": ["a", "b"]},
        {"measure": "m"},
        {"expect": {"measure": "m", "backing": {"max": "1M"}}},
        {"restore": {}},
    )
    assert player.failures == ["b is not the same as a", "backing of m: 100.0 MiB is more than 1.0 MiB"]
    expected = [Outcome.OK, Outcome.OK, Outcome.FAILED, Outcome.OK, Outcome.FAILED, Outcome.OK]
    assert outcomes(player) == expected


async def test_backing_and_store_are_bounded_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vm = StandInVm(tmp_path)
    plain = vm.measure

    async def with_store() -> Measure:
        return (await plain()).model_copy(update={"store_bytes": 7 * MiB})

    monkeypatch.setattr(vm, "measure", with_store)
    player = await played(
        vm,
        {"measure": "m"},
        {"expect": {"measure": "m", "backing": {"max": "400M"}, "backing_and_store": {"max": "407M"}}},
        {"expect": {"measure": "m", "backing_and_store": {"max": "1M"}}},
    )
    (failure,) = player.failures
    assert failure.startswith("backing and store of m: ")
    assert failure.endswith("7.0 MiB is more than 1.0 MiB")


async def test_outputs_are_compared_as_bytes(tmp_path: Path) -> None:
    # As text both would read \xff.
    outputs = {"one": b"\xff", "two": b"\\xff"}

    async def command(line: str) -> ExecResult:
        return ExecResult(exit_status=0, stdout=outputs[line])

    player = await played(
        StandInVm(tmp_path, command), {"guest": "one", "save": "a"}, {"guest": "two", "save": "b"}, {"same": ["a", "b"]}
    )
    assert player.saved["a"] == player.saved["b"]
    assert player.failures == ["b is not the same as a"]


@pytest.mark.parametrize(
    ("result", "said"),
    [
        (ExecResult(exit_status=3, stderr=b"no \x1b[31mway\n"), r"exited with status 3: no \x1b[31mway"),
        (ExecResult(exit_status=1, stdout=b"mismatch\n"), "exited with status 1: mismatch"),
        (ExecResult(exit_status=None, signal=9), "was killed by signal 9"),
        (ExecResult(exit_status=None, signal=9, timed_out=True), "did not end within 5.0 s"),
        (ExecResult(exit_status=0, timed_out=True), "did not end within 5.0 s"),
    ],
)
async def test_a_command_that_fails_ends_the_scenario(tmp_path: Path, result: ExecResult, said: str) -> None:
    async def command(_line: str) -> ExecResult:
        return result

    vm = StandInVm(tmp_path, command)
    player = await played(vm, {"guest": "x", "timeout": "5s"}, {"measure": "m"}, {"restore": {}})
    assert player.failures == [f"step 1, guest: x: {said}", "2 steps were not run"]
    assert outcomes(player) == [Outcome.FAILED, Outcome.NOT_RUN, Outcome.NOT_RUN]
    assert vm.log == ["guest x"]
    assert player.measures == {}


async def test_a_cut_output_is_never_saved(tmp_path: Path) -> None:
    async def command(_line: str) -> ExecResult:
        return ExecResult(exit_status=0, stdout=b"half", truncated=True)

    player = await played(StandInVm(tmp_path, command), {"guest": "x"}, {"guest": "x", "save": "a"})
    assert outcomes(player) == [Outcome.OK, Outcome.FAILED]
    assert player.saved == {}


async def test_a_step_does_not_outlive_the_vm(tmp_path: Path) -> None:
    async def command(_line: str) -> ExecResult:
        asyncio.get_running_loop().call_soon(vm.failure.set_result, "QEMU was killed by SIGKILL")
        await asyncio.sleep(60)
        raise AssertionError("nobody cancelled us")

    vm = StandInVm(tmp_path, command)
    player = await played(vm, {"reclaim": {"every": "1s"}}, {"guest": "x"}, {"measure": "m"})
    assert player.failures == [
        "step 2, guest: x: the command: QEMU was killed by SIGKILL",
        "1 step was not run",
    ]
    # There is nobody left who could be asked to stop.
    assert "stop" not in vm.log


async def test_a_host_agent_that_never_answers_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def command(_line: str) -> ExecResult:
        await asyncio.sleep(60)
        raise AssertionError("nobody cancelled us")

    monkeypatch.setattr(player_module, "GRACE_SECONDS", 0.05)
    player = await played(StandInVm(tmp_path, command), {"guest": "x", "timeout": "10ms"})
    assert len(player.failures) == 1
    assert "no answer within" in player.failures[0]


async def test_a_reclaim_beside_the_steps_is_ended_whatever_happens(tmp_path: Path) -> None:
    vm = StandInVm(tmp_path)
    vm.errors["measure"] = PeerLost("the pager is gone")
    player = await played(vm, {"reclaim": {"every": "1s"}}, {"measure": "m"}, {"reclaim": "stop"})
    assert outcomes(player) == [Outcome.OK, Outcome.FAILED, Outcome.NOT_RUN]
    assert vm.log[-1] == "stop"
    assert [epoch.number for epoch in player.epochs] == [9]

    forgotten = StandInVm(tmp_path)
    assert (await played(forgotten, {"reclaim": {"every": "1s"}})).failures == []
    assert forgotten.log[-1] == "stop"


async def test_what_ended_a_reclaim_fails_the_stop(tmp_path: Path) -> None:
    vm = StandInVm(tmp_path)
    vm.errors["stop"] = RefusedError("a migration is under way", "wait")
    player = await played(vm, {"reclaim": {"every": "1s"}}, {"reclaim": "stop"}, {"measure": "m"})
    assert player.failures[0] == "step 2, reclaim stop: a migration is under way (wait)"
    assert outcomes(player) == [Outcome.OK, Outcome.FAILED, Outcome.NOT_RUN]


async def test_a_cancelled_step_has_not_held(tmp_path: Path) -> None:
    async def command(_line: str) -> ExecResult:
        await asyncio.sleep(60)
        raise AssertionError("nobody cancelled us")

    player = Player(
        StandInVm(tmp_path, command), a_scenario({"guest": "x"}, {"measure": "m"}), Remembering(), lambda: 0.0
    )
    task = asyncio.create_task(player.play())
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert outcomes(player) == [Outcome.FAILED, Outcome.NOT_RUN]
    assert player.failures == ["1 step was not run"]


async def test_a_bug_is_not_taken_for_a_failure(tmp_path: Path) -> None:
    vm = StandInVm(tmp_path)
    vm.errors["measure"] = KeyError("a bug")
    with pytest.raises(KeyError):
        await played(vm, {"measure": "m"})
