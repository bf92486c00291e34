"""Scenario files."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvaqemu.bounds import SizeBounds
from hvaqemu.errors import ConfigError
from hvaqemu.reclaim_config import DEFAULT_STATES, ReclaimState
from hvaqemu.scenario_config import (
    BalloonStep,
    ExpectStep,
    GuestStep,
    MeasureStep,
    ReclaimPlan,
    ReclaimStep,
    ReclaimStopStep,
    RestoreStep,
    SameStep,
    Scenario,
    SleepStep,
    Step,
    load_scenario,
    verb_of,
)
from hvaqemu.units import MiB

VM = "vm: {name: one, memory: 512M, allow_exec: true}\n"

QUICKSTART = """\
vm:
  name: quickstart
  machine: s390x            # a machine profile
  accelerator: tcg
  memory: 512M
  cpus: 2
  image: debian-s390x
  extra_disks: []           # further raw images, {path, read_only}
  allow_exec: true
steps:
  - guest: "find /usr -xdev -type f -print0 | sort -z | xargs -0 md5sum | md5sum"
    save: before            # stdout kept under this name
    timeout: 120s
  - measure: filled
  - reclaim: {states: [unused, volatile]}
  - measure: reclaimed
  - guest: "true"
    save: after
  - measure: reaccessed
  - same: [before, after]
  - expect: {measure: reclaimed, backing: {max: 90M}}
  - expect: {measure: reclaimed, backing: {max_ratio: 0.17, of: filled}}
  - reclaim: {states: [unused, volatile], every: 200ms}   # keeps running beside the steps that follow
  - guest: "md5sum -c /tmp/sums"
  - sleep: 1500ms
  - reclaim: stop
  - reclaim: {epochs: 2}
  - balloon: 128M
  - restore: {}
  - restore:
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "s.yaml"
    path.write_text(text)
    return path


def test_every_kind_of_step(tmp_path: Path) -> None:
    scenario = load_scenario(write(tmp_path, QUICKSTART))
    kinds = [type(step) for step in scenario.steps]
    assert kinds == [
        GuestStep,
        MeasureStep,
        ReclaimStep,
        MeasureStep,
        GuestStep,
        MeasureStep,
        SameStep,
        ExpectStep,
        ExpectStep,
        ReclaimStep,
        GuestStep,
        SleepStep,
        ReclaimStopStep,
        ReclaimStep,
        BalloonStep,
        RestoreStep,
        RestoreStep,
    ]
    first = scenario.steps[0]
    assert isinstance(first, GuestStep)
    assert (first.save, first.timeout) == ("before", 120.0)
    continuous = scenario.steps[9]
    assert isinstance(continuous, ReclaimStep)
    assert continuous.reclaim == ReclaimPlan(states=DEFAULT_STATES, every=0.2)
    assert scenario.steps[14] == BalloonStep(balloon=128 * MiB)
    assert [verb_of(step) for step in scenario.steps[:3]] == ["guest", "measure", "reclaim"]
    assert Scenario.model_validate_json(scenario.model_dump_json()) == scenario


def lone_steps() -> st.SearchStrategy[Step]:
    """Steps that need no other step."""
    seconds = st.floats(1e-6, 1e6)
    states = st.lists(st.sampled_from(ReclaimState), min_size=1, unique=True).map(tuple)
    plans = st.builds(ReclaimPlan, states=states, epochs=st.none() | st.integers(1, 100))
    return (
        st.builds(GuestStep, guest=st.text(min_size=1).filter(lambda t: t.strip() and "\0" not in t), timeout=seconds)
        | st.builds(ReclaimStep, reclaim=plans)
        | st.builds(SleepStep, sleep=seconds)
        | st.builds(BalloonStep, balloon=st.integers(1, 512 * MiB), timeout=seconds)
        | st.builds(RestoreStep, restore=st.just({}))
    )


@given(st.lists(lone_steps(), max_size=6), st.booleans())
def test_json_round_trip(steps: list[Step], run_beside: bool) -> None:
    if run_beside:
        beside: list[Step] = [
            ReclaimStep(reclaim=ReclaimPlan(every=0.5)),
            MeasureStep(measure="a"),
            ReclaimStopStep(reclaim="stop"),
            ExpectStep.model_validate({"expect": {"measure": "a", "backing": {"min": 1}}}),
        ]
        steps = [*steps, *beside]
    vm = {"name": "one", "memory": "512M", "allow_exec": True}
    scenario = Scenario.model_validate({"vm": vm, "steps": steps})
    assert Scenario.model_validate_json(scenario.model_dump_json()) == scenario


@pytest.mark.parametrize(
    ("steps", "says"),
    [
        (" - gest: ls\n", "s.yaml:3: key steps[0]: a step has exactly one of guest, measure,"),
        (" - {guest: ls, measure: x}\n", "s.yaml:3: key steps[0]: a step has exactly one of"),
        (" - {}\n", "s.yaml:3: key steps[0]: a step has exactly one of"),
        (" - stop\n", "s.yaml:3: key steps[0]: a step is a mapping with one of"),
        (" - guest: ls\n   tiemout: 3s\n", "s.yaml:4: key steps[0].tiemout: is not a known key"),
        (" - guest: ''\n", "s.yaml:3: key steps[0].guest: must be a shell command"),
        (" - guest: ls\n   timeout: 0\n", "s.yaml:4: key steps[0].timeout: input should be greater than 0, not 0"),
        (" - guest: ls\n   save: a\n - guest: ls\n   save: a\n", "s.yaml:6: key steps[1].save: 'a' is saved by"),
        (" - measure: a\n - measure: a\n", "s.yaml:4: key steps[1].measure: 'a' is measured by an earlier step"),
        (" - reclaim: now\n", "s.yaml:3: key steps[0].reclaim: input should be 'stop', not 'now'"),
        (" - reclaim: stop\n", "s.yaml:3: key steps[0].reclaim: no `reclaim` with `every` runs here"),
        (" - reclaim: {states: []}\n", "s.yaml:3: key steps[0].reclaim.states: name each state once"),
        (" - reclaim: {states: [precious]}\n", "s.yaml:3: key steps[0].reclaim.states[0]: input should be 'unused', "),
        (" - reclaim: {epochs: 0}\n", "s.yaml:3: key steps[0].reclaim.epochs: input should be greater"),
        (" - reclaim: {epochs: 1, every: 1s}\n", "s.yaml:3: key steps[0].reclaim.every: goes on until"),
        (
            " - reclaim: {every: 1s}\n - reclaim: {}\n",
            "s.yaml:4: key steps[1].reclaim: an earlier `every` still runs",
        ),
        (" - same: [a]\n", "s.yaml:3: key steps[0].same: tuple should have at least 2 items"),
        (" - guest: ls\n   save: a\n - same: [a, b]\n", "s.yaml:5: key steps[1].same[1]: no earlier step saves 'b'"),
        (" - expect: {measure: a, backing: {max: 1M}}\n", "s.yaml:3: key steps[0].expect.measure: no earlier step"),
        (
            " - measure: a\n - expect: {measure: a, backing: {}}\n",
            "s.yaml:4: key steps[1].expect.backing: needs max, min,",
        ),
        (
            " - measure: a\n - expect: {measure: a, backing: {max_ratio: 0.5}}\n",
            "s.yaml:4: key steps[1].expect.backing: a ratio needs `of`",
        ),
        (
            " - measure: a\n - expect: {measure: a, backing: {max_ratio: 0.5, of: b}}\n",
            "s.yaml:4: key steps[1].expect.backing.of: no earlier step measures 'b'",
        ),
        (" - measure: a\n - expect: {measure: a}\n", "s.yaml:4: key steps[1].expect: needs backing or backing_and_st"),
        (
            " - measure: a\n - expect: {measure: a, backing_and_store: {max_ratio: 0.5, of: b}}\n",
            "s.yaml:4: key steps[1].expect.backing_and_store.of: no earlier step measures 'b'",
        ),
        (" - balloon: 1G\n", "s.yaml:3: key steps[0].balloon: must be more than nothing and at most 512.0 MiB"),
        (" - sleep: x\n", "s.yaml:3: key steps[0].sleep: 'x' is not a duration"),
    ],
)
def test_wrong_step_names_line_and_key(tmp_path: Path, steps: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_scenario(write(tmp_path, f"{VM}steps:\n{steps}"))
    said = str(caught.value).removeprefix(f"{tmp_path}/")
    assert said.startswith(says)
    assert "\n" not in said


def test_guest_steps_need_permission(tmp_path: Path) -> None:
    text = "vm: {name: one, memory: 512M}\nsteps:\n - guest: ls\n"
    with pytest.raises(ConfigError, match=r"s\.yaml:3: key steps\[0\]\.guest: needs `allow_exec: true` in vm"):
        load_scenario(write(tmp_path, text))


def test_disks_are_relative_to_the_file(tmp_path: Path) -> None:
    text = "vm: {name: one, memory: 512M, extra_disks: [{path: d.raw}]}\n"
    assert load_scenario(write(tmp_path, text)).vm.extra_disks[0].path == tmp_path / "d.raw"


def test_bounds() -> None:
    absolute = SizeBounds(max=10 * MiB, min=5 * MiB)
    assert list(absolute.violations(7 * MiB, None)) == []
    assert list(absolute.violations(11 * MiB, None)) == ["11.0 MiB is more than 10.0 MiB"]
    assert list(absolute.violations(4 * MiB, None)) == ["4.0 MiB is less than 5.0 MiB"]
    ratio = SizeBounds(of="filled", max_ratio=0.17)
    assert list(ratio.violations(17, 100)) == []
    assert list(ratio.violations(18, 100)) == ["18 B is 0.180 of filled, more than 0.17"]
    assert list(ratio.violations(1, 0)) == ["1 B is inf of filled, more than 0.17"]
