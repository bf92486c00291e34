"""Titles of steps: short, printable, one line."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from hva_host.scenario.titles import LONGEST, title_of
from hvaqemu.load_config import LoadExpectStep, LoadStep, LoadStopStep
from hvaqemu.scenario_config import (
    BalloonStep,
    ExpectStep,
    GuestStep,
    MeasureStep,
    ReclaimStep,
    ReclaimStopStep,
    RestoreStep,
    SameStep,
    SetStep,
    SleepStep,
    Step,
)


@pytest.mark.parametrize(
    ("step", "title"),
    [
        (GuestStep(guest="uname -m"), "guest: uname -m"),
        (GuestStep(guest="\nset -e\ntrue\n"), "guest: set -e …"),
        (GuestStep(guest="# check it\ntrue\n"), "guest: check it"),
        (MeasureStep(measure="m"), "measure m"),
        (ReclaimStep.model_validate({"reclaim": {}}), "reclaim unused, volatile"),
        (ReclaimStep.model_validate({"reclaim": {"every": "200ms"}}), "reclaim unused, volatile every 200 ms"),
        (ReclaimStopStep(reclaim="stop"), "reclaim stop"),
        (RestoreStep.model_validate({"restore": None}), "restore"),
        (BalloonStep.model_validate({"balloon": "128M"}), "balloon 128 MiB"),
        (SleepStep.model_validate({"sleep": "1.5s"}), "sleep 1.5 s"),
        (SameStep(same=("a", "b")), "same a, b"),
        (
            ExpectStep.model_validate({"expect": {"measure": "m", "backing": {"min": "1M", "max": "2M"}}}),
            "expect m >= 1 MiB and <= 2 MiB",
        ),
        (
            ExpectStep.model_validate({"expect": {"measure": "m", "backing_and_store": {"max": "2M"}}}),
            "expect m with store <= 2 MiB",
        ),
        (
            ExpectStep.model_validate({"expect": {"measure": "m", "backing": {"of": "n", "max_ratio": 0.17}}}),
            "expect m <= 0.17 of n",
        ),
        (SetStep.model_validate({"set": {"mode": "proactive"}}), "set reclaim proactive"),
        (
            LoadStep.model_validate({"load": {"url": ["/a", "/b/[1-2]"], "rate": "90/min", "save": "x"}}),
            "load x: 1.5/s to /a /b/[1-2]",
        ),
        (LoadStopStep(load="stop"), "load stop"),
        (LoadExpectStep.model_validate({"expect": {"load": "x"}}), "expect x without errors"),
        (
            LoadExpectStep.model_validate(
                {"expect": {"load": "x", "throughput": {"min": "9/s"}, "p99": {"of": "y", "max_ratio": 2}}}
            ),
            "expect x throughput >= 9/s and p99 <= 2 of y",
        ),
    ],
)
def test_titles(step: Step, title: str) -> None:
    assert title_of(step) == title


@given(st.text())
def test_a_command_becomes_one_short_printable_line(command: str) -> None:
    try:
        step = GuestStep(guest=command)
    except ValidationError:
        return
    title = title_of(step)
    assert title.isprintable()
    assert len(title) <= LONGEST
