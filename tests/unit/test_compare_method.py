"""What each method makes of a scenario."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest

from hva_host.compare.method import Begin, Method, goes_on_by_itself, methods_named, played_under, refuse
from hvaqemu.errors import ConfigError
from hvaqemu.reclaim_config import ReclaimConfig, ReclaimMode
from hvaqemu.scenario_config import Scenario, verb_of
from hvaqemu.units import MiB
from tests.unit.test_scenario_player import a_scenario

STEPS = (
    {"guest": "x", "save": "a"},
    {"measure": "m"},
    {"reclaim": {"every": "200ms"}},
    {"reclaim": "stop"},
    {"restore": None},
    {"balloon": "128M"},
    {"guest": "x", "save": "b"},
    {"same": ["a", "b"]},
    {"expect": {"measure": "m", "backing": {"max": "1M"}}},
)


@pytest.mark.parametrize("method", Method)
def test_all_play_the_same_work_and_keep_its_bytes(method: Method) -> None:
    scenario = a_scenario(*STEPS)
    played = played_under(scenario, method)
    verbs = [verb_of(step) for step in played.scenario.steps]
    common = ["guest", "measure", "reclaim", "reclaim", "restore", "guest", "same"]
    assert verbs == common + (["expect"] if method is Method.HVA else [])
    assert "balloon 128 MiB" in played.left_out
    assert ("expect m <= 1 MiB" in played.left_out) is (method is not Method.HVA)
    # Still a scenario that a file could hold.
    assert Scenario.model_validate(played.scenario.model_dump(mode="json")) == played.scenario


def test_only_hva_discards_and_each_has_the_balloon_it_needs() -> None:
    vm = {"name": "vm", "memory": 512 * MiB, "allow_exec": True, "keep_disks": True}
    vm["reclaim"] = {"mode": "proactive", "min_resident": 96 * MiB}
    scenario = Scenario.model_validate({"vm": vm, "steps": []})
    under = {method: played_under(scenario, method).scenario.vm for method in Method}
    assert under[Method.HVA].reclaim == scenario.vm.reclaim
    for method in (Method.NONE, Method.BALLOON, Method.FREE_PAGE_REPORTING):
        assert under[method].reclaim.mode is ReclaimMode.OFF
        assert under[method].reclaim.min_resident == 96 * MiB
    assert [under[method].balloon.free_page_reporting for method in Method] == [False, False, True, False]
    assert [under[method].balloon.deflate_on_oom for method in Method] == [False, True, False, False]
    # What one method's guest writes is nothing to the next one's.
    assert not any(config.keep_disks for config in under.values())


@pytest.mark.parametrize(
    ("mode", "always"), [("off", False), ("manual", False), ("proactive", True), ("pressure", True)]
)
def test_what_policy_does_all_the_time_others_do_all_the_time(mode: str, always: bool) -> None:
    assert goes_on_by_itself(ReclaimConfig(mode=ReclaimMode(mode))) is always


@pytest.mark.parametrize(
    ("mode", "steps", "begin"),
    [
        ("manual", STEPS[:4], Begin(step=3)),
        ("manual", ({"measure": "m"}, {"reclaim": {}}, {"reclaim": {"every": "1s"}}), Begin(step=2, beside=False)),
        ("manual", ({"set": {"mode": "manual"}}, {"set": {"mode": "proactive"}}, {"reclaim": {}}), Begin(step=2)),
        # A title that is cut does not say that it goes on.
        (
            "manual",
            ({"reclaim": {"states": ["unused", "volatile", "potential", "stable"], "every": "1s"}},),
            Begin(step=1),
        ),
        ("proactive", ({"reclaim": {}},), Begin()),
        ("manual", ({"measure": "m"},), Begin()),
    ],
)
@pytest.mark.parametrize("method", Method)
def test_where_reclaiming_begins_is_the_same_for_all(
    method: Method, mode: str, steps: tuple[dict[str, object], ...], begin: Begin
) -> None:
    vm = {"name": "vm", "memory": 512 * MiB, "allow_exec": True, "reclaim": {"mode": mode}}
    assert played_under(Scenario.model_validate({"vm": vm, "steps": steps}), method).begin == begin


@pytest.mark.parametrize(
    ("vm", "steps", "methods", "said"),
    [
        ({"allow_exec": False}, (), Method, "allow_exec: true"),
        (
            {"reclaim": {"mode": "off"}},
            ({"reclaim": {}},),
            Method,
            r"step 1, reclaim: hva may not, reclaim is in mode off",
        ),
        ({}, ({"set": {"mode": "off"}}, {"reclaim": {}}), Method, r"step 2, reclaim: hva may not"),
        (
            {"reclaim": {"mode": "off"}, "balloon": {"free_page_reporting": True}},
            ({"measure": "m"},),
            Method,
            r"vm\.balloon\.free_page_reporting: hva discards nothing",
        ),
        ({"reclaim": {"mode": "pressure"}}, (), Method, "mode pressure: hva acts only while the host is short"),
        ({}, ({"set": {"mode": "pressure"}},), Method, "mode pressure"),
        # Others than hva do not mind, nor does hva once it is allowed; without a balloon pressure is as good as any.
        ({"reclaim": {"mode": "off"}}, ({"reclaim": {}},), (Method.NONE, Method.BALLOON), ""),
        ({"reclaim": {"mode": "off"}}, ({"set": {"mode": "manual"}}, {"reclaim": {}}), Method, ""),
        ({"reclaim": {"mode": "pressure"}}, (), (Method.NONE, Method.HVA), ""),
    ],
)
def test_what_would_spoil_a_comparison_is_found_first(
    vm: dict[str, object], steps: tuple[dict[str, object], ...], methods: Iterable[Method], said: str
) -> None:
    base = {"name": "vm", "memory": 512 * MiB, "allow_exec": True}
    scenario = Scenario.model_validate({"vm": base | vm, "steps": steps})
    if not said:
        refuse(scenario, tuple(methods), Path("some.yaml"))
        return
    with pytest.raises(ConfigError, match=rf"some\.yaml: .*{said}"):
        refuse(scenario, tuple(methods), Path("some.yaml"))


def test_methods_are_named_once_and_in_order() -> None:
    assert methods_named("hva, none") == (Method.HVA, Method.NONE)
    for wrong, said in (("none,ballon", "'ballon' is not a method"), ("none,none", "there twice"), ("", "'' is not")):
        with pytest.raises(ConfigError, match=said):
            methods_named(wrong)
