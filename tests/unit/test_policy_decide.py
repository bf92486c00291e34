"""One look in, decisions out: what keeps anything from being decided, and how the parts are joined."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest

from hva_host.policy.decide import REPORT_SECONDS, decide
from hva_host.policy.decisions import Complaint, Decisions, Phase, Purpose, Warn
from hva_host.policy.judge import STALE_SECONDS
from hva_host.policy.pacing import ORDER_SECONDS
from hva_host.policy.rungs import BALLOON_RUNG, URGENT_RUNG
from hva_host.policy.samples import Condition, GuestWord, HostSample, Limits, Look, Report, VmSample
from hva_host.policy.state import PolicyMemory, ProactiveState, Rest, TargetState
from hvaqemu.pages import PAGE_SHIFT
from hvaqemu.reclaim_config import ReclaimState
from hvaqemu.units import GiB, MiB
from tests.unit.policy_samples import HOST, MEG, VM, at, config, decided, epoch, limits, refaulted

PROACTIVE = limits({"a": config(mode="proactive")})
SHORT_HOST = replace(HOST, available_bytes=200 * MiB)


def looked(allowed: Limits = PROACTIVE, sample: VmSample = VM, until: float = 111.0) -> PolicyMemory:
    """After so many looks that the rate is known; ``sample`` is what the next one is to be like."""
    memory = PolicyMemory()
    for now in (100.0, until - 1):
        memory, _ = decided([at(now, sample, condition=Condition.AWAY)], allowed, now, memory)
    return memory


def phase(decisions: Decisions) -> Phase:
    return decisions.views[0].phase


def idle(decisions: Decisions) -> bool:
    return not (decisions.steps or decisions.scans or decisions.balloons or decisions.warnings)


def test_a_plain_guest_is_stepped_at() -> None:
    _, decisions = decided([at(111.0)], PROACTIVE, 111.0, looked())
    (step,) = decisions.steps
    assert (step.vm, step.purpose, step.sampled) == ("a", Purpose.PROACTIVE, True)
    (view,) = decisions.views
    assert (view.phase, view.refault_rate) == (Phase.GROWING, 0)
    assert view.budget == pytest.approx(0.002 * (view.working_set or 0), rel=0.01)


def test_what_is_known_of_a_vm_outlives_looks_that_fail() -> None:
    memory = looked()
    kept, _ = decide(memory, Look(replace(HOST, at_s=111.0), (), silent=("a",)), PROACTIVE, 111.0)
    assert kept.vms == memory.vms
    gone, _ = decide(memory, Look(replace(HOST, at_s=111.0), ()), PROACTIVE, 111.0)
    assert gone.vms == {}


def test_what_others_hold_counts_for_the_budget() -> None:
    allowed = limits({"a": config(mode="pressure")}, budget_bytes=GiB)
    look = Look(replace(HOST, at_s=111.0), (at(111.0),))
    _, decisions = decide(looked(allowed), look, allowed, 111.0)
    assert not decisions.steps
    _, decisions = decide(looked(allowed), replace(look, others_bytes=900 * MiB), allowed, 111.0)
    assert decisions.steps


@pytest.mark.parametrize(
    "change",
    [
        {"at_s": 111.0 - STALE_SECONDS - 1},
        {"at_s": 110.0},
        {"condition": Condition.PAUSED},
        {"condition": Condition.HELD},
        {"condition": Condition.AWAY},
        {"refused": "a migration is under way"},
        {"refaults": refaulted(-1)},
        {"guest": GuestWord(0.0, 512 * MiB, MiB)},
    ],
)
def test_nothing_is_decided_on_what_is_old_or_incomplete(change: dict[str, Any]) -> None:
    _, decisions = decided([replace(at(111.0), **change)], PROACTIVE, 111.0, looked())
    assert idle(decisions)
    assert phase(decisions) in (Phase.BLIND, Phase.GUEST_SHORT)


@pytest.mark.parametrize("mode", ["off", "manual", "pressure"])
def test_modes_that_do_nothing_by_themselves(mode: str) -> None:
    allowed = limits({"a": config(mode=mode)})
    _, decisions = decided([at(111.0)], allowed, 111.0, looked(allowed))
    assert idle(decisions)
    assert phase(decisions) is Phase.IDLE


def test_a_vm_that_may_be_taken_from_is_watched() -> None:
    allowed = limits({"a": config(mode="pressure")})
    old = replace(VM, report=Report(61.0, 0, 50_000, 0, 50_000))
    _, decisions = decided([at(111.0, old)], allowed, 111.0, looked(allowed, old))
    assert [scan.vm for scan in decisions.scans] == ["a"]


def test_a_vm_that_nobody_configured_is_left_alone() -> None:
    _, decisions = decided([VM], limits({}), 100.0)
    assert decisions.views == ()


def test_a_guest_that_never_reported_is_asked_once_in_a_while() -> None:
    silent = replace(VM, report=None)
    memory, first = decided([at(111.0, silent)], PROACTIVE, 111.0, looked(sample=silent))
    _, second = decided([at(112.0, silent)], PROACTIVE, 112.0, memory)
    assert (len(first.scans), len(first.steps), len(second.scans)) == (1, 0, 0)
    _, decisions = decided([at(111.0, silent, guest_connected=False)], PROACTIVE, 111.0, looked(sample=silent))
    assert idle(decisions)


def test_on_an_old_report_the_guest_is_asked_first() -> None:
    old = replace(VM, report=Report(REPORT_SECONDS + 1, 0, 50_000, 0, 50_000))
    _, decisions = decided([at(111.0, old)], PROACTIVE, 111.0, looked(sample=old))
    assert (len(decisions.scans), len(decisions.steps)) == (1, 0)
    # Copies need nothing from it: where it is not there they are proven all the same.
    _, decisions = decided([at(111.0, old, guest_connected=False)], PROACTIVE, 111.0, looked(sample=old))
    assert (len(decisions.scans), len(decisions.steps)) == (0, 1)


def test_one_step_at_a_time() -> None:
    memory, _ = decided([at(111.0)], PROACTIVE, 111.0, looked())
    memory, decisions = decided([at(130.0)], PROACTIVE, 130.0, memory)
    assert idle(decisions)
    memory, decisions = decided([at(131.0, epoch=epoch(1, 50, scan_s=0.01))], PROACTIVE, 131.0, memory)
    assert idle(decisions)
    memory, decisions = decided([at(140.0, epoch=epoch(1, 50, scan_s=0.01))], PROACTIVE, 140.0, memory)
    assert len(decisions.steps) == 1


def test_a_step_that_never_ends_is_given_up() -> None:
    memory, _ = decided([at(111.0)], PROACTIVE, 111.0, looked())
    for now, again in ((111.0 + ORDER_SECONDS, False), (112.0 + ORDER_SECONDS, False), (240.0, True)):
        memory, decisions = decided([at(now)], PROACTIVE, now, memory)
        assert bool(decisions.steps) is again, now


def test_nothing_is_ordered_of_a_vm_that_is_busy_with_what_was() -> None:
    _, decisions = decided([at(111.0, busy=True)], PROACTIVE, 111.0, looked())
    assert idle(decisions)
    assert decisions.views[0].reason == "what was asked of it before is under way"


def test_a_step_that_failed_is_ordered_again_in_an_emergency_and_not_at_once() -> None:
    hardly = replace(HOST, available_bytes=MiB)
    memory = looked()
    ordered: list[int] = []
    # It fails within 2 s each time, that is without an epoch.
    for now in range(111, 121):
        waits = bool(ordered) and now - ordered[-1] < 2
        memory, decisions = decided([at(float(now), busy=waits)], PROACTIVE, float(now), memory, hardly)
        ordered += [now] * len(decisions.steps)
        assert all(step.purpose is Purpose.EMERGENCY for step in decisions.steps)
    assert ordered == [111, 115, 119]


def played(host: HostSample, *looks: VmSample) -> list[tuple[float, int]]:
    """When steps were ordered, and on which rung."""
    memory, found = looked(), []
    for sample in looks:
        memory, decisions = decided([sample], PROACTIVE, sample.at_s, memory, host)
        found += [(sample.at_s, memory.host.rung) for _ in decisions.steps]
    return found


HARDLY = replace(HOST, available_bytes=MiB)


def test_in_an_emergency_a_step_follows_the_other() -> None:
    looks = [at(111.0 + number, epoch=epoch(number, 1000), busy=False) for number in range(4)]
    assert [now for now, _ in played(HARDLY, *looks)] == [111.0, 112.0, 113.0, 114.0]
    mild = replace(HOST, available_bytes=400 * MiB)
    assert [now for now, _ in played(mild, *looks)] == [111.0, 114.0]


def test_one_that_wants_everything_back_is_not_asked_on_that_rung_again() -> None:
    """Nor because what it wanted back made it larger than it was in between."""
    rungs = []
    for number, (now, resident) in enumerate(((111.0, 400), (112.0, 350), (113.0, 390), (114.0, 400), (115.0, 400))):
        back = 12_000 * max(0, number - 1)
        sample = at(now, epoch=epoch(number, 12_000), refaults=refaulted(back), busy=False)
        rungs.append(replace(sample, backing_bytes=resident * MiB))
    later = [at(116.0 + number, rungs[-1]) for number in range(20)]
    found = [rung for _, rung in played(HARDLY, *rungs, *later)]
    assert found == sorted(found)
    assert found.count(URGENT_RUNG) == 2
    # What fails twice is not tried again, either.
    assert len(found) <= 2 * (BALLOON_RUNG - URGENT_RUNG + 1)


def test_a_vm_that_fails_again_and_again_leaves_it_to_others() -> None:
    allowed = limits({"a": config(mode="pressure"), "b": config(mode="pressure")})
    memory = PolicyMemory()
    asked: list[str] = []
    for number in range(30):
        now = 100.0 + number
        # The one whose memory is cheapest never does what it is told.
        failing = at(now, replace(VM, memory_bytes=8 * GiB, backing_bytes=6 * GiB), busy=False)
        done = at(now, replace(VM, name="b"), epoch=epoch(asked.count("b"), 5000), busy=False)
        memory, decisions = decided([failing, done], allowed, now, memory, HARDLY)
        asked += [step.vm for step in decisions.steps]
    assert asked.count("b") > 5
    assert 2 <= asked.count("a") <= 2 * (BALLOON_RUNG - URGENT_RUNG)


def test_another_mode_begins_anew() -> None:
    memory, _ = decided([at(111.0)], PROACTIVE, 111.0, looked())
    target = limits({"a": config(mode="target", target="100M")})
    memory, decisions = decided([at(112.0)], target, 112.0, memory)
    # The step under way is this VM's, whatever it was ordered for.
    assert idle(decisions)
    memory, decisions = decided([at(113.0, epoch=epoch(1))], target, 113.0, memory)
    assert not decisions.steps
    _, decisions = decided([at(120.0, epoch=epoch(1))], target, 120.0, memory)
    assert [step.purpose for step in decisions.steps] == [Purpose.TARGET]


def test_another_target_or_other_states_count_at_once() -> None:
    small = config(mode="target", target="64M")
    given_up = TargetState(until_s=900.0, pause_s=480.0)
    memory = knowing(looked(limits({"a": small})), config=small, target=given_up)
    _, decisions = decided([at(111.0)], limits({"a": small}), 111.0, memory)
    assert not decisions.steps
    for other in (config(mode="target", target="200M"), config(mode="target", target="64M", states=list(ReclaimState))):
        _, decisions = decided([at(111.0)], limits({"a": other}), 111.0, memory)
        assert [step.purpose for step in decisions.steps] == [Purpose.TARGET]


def test_another_budget_ends_a_rest() -> None:
    rest = Rest(VM.backing_bytes >> PAGE_SHIFT, 100 * MEG, 200 * MEG, 10 * MEG, until_s=400.0)
    memory = knowing(looked(), config=PROACTIVE.reclaim["a"], proactive=ProactiveState(rest=rest))
    _, decisions = decided([at(111.0)], PROACTIVE, 111.0, memory)
    assert not decisions.steps
    more = limits({"a": config(mode="proactive", refault_budget="5%/min")})
    _, decisions = decided([at(111.0)], more, 111.0, memory)
    assert [step.purpose for step in decisions.steps] == [Purpose.PROACTIVE]


def knowing(memory: PolicyMemory, **changes: Any) -> PolicyMemory:
    """With something else remembered of the VM."""
    return replace(memory, vms={"a": replace(memory.vms["a"], **changes)})


def test_what_is_left_untouched_in_a_mild_shortage_is_not_denied() -> None:
    mild = replace(HOST, available_bytes=int(0.9 * GiB))
    allowed = limits({"a": config(mode="manual")}, available_bytes=GiB)
    memory = PolicyMemory()
    found: list[Warn] = []
    for now in range(100, 300):
        memory, decisions = decided([at(float(now))], allowed, float(now), memory, mild)
        found += decisions.warnings
    assert found
    assert found[0].reason.endswith("no VM has anything left that is worth taking for that")


def test_the_host_comes_before_a_vms_own_mode() -> None:
    _, decisions = decided([at(111.0)], PROACTIVE, 111.0, looked(), SHORT_HOST)
    (step,) = decisions.steps
    assert step.purpose is Purpose.PRESSURE or step.purpose is Purpose.EMERGENCY
    assert phase(decisions) is Phase.PRESSED


def test_an_old_look_at_the_host_says_nothing() -> None:
    old = replace(SHORT_HOST, at_s=111.0 - STALE_SECONDS - 1)
    _, decisions = decide(looked(), Look(old, (at(111.0),)), PROACTIVE, 111.0)
    assert [step.purpose for step in decisions.steps] == [Purpose.PROACTIVE]


@pytest.mark.parametrize("mode", ["off", "manual"])
def test_where_nobody_may_be_taken_from_that_is_said(mode: str) -> None:
    allowed = limits({"a": config(mode=mode)}, available_bytes=GiB)
    memory, found = PolicyMemory(), []
    for now in range(100, 300):
        memory, decisions = decided([at(float(now))], allowed, float(now), memory, SHORT_HOST)
        assert not decisions.steps and not decisions.balloons
        found += [(now, warn) for warn in decisions.warnings]
    assert {warn.complaint for _, warn in found} == {Complaint.NOTHING_LEFT}
    assert "no VM has anything left" in found[0][1].reason
    # Soon, and then once a minute.
    assert found[0][0] < 150
    assert [later - now for (now, _), (later, _) in itertools.pairwise(found)] == [60] * (len(found) - 1)


def test_a_guest_that_is_short_itself_is_taken_from_in_an_emergency_and_that_is_said() -> None:
    short = replace(VM, guest=GuestWord(0.0, 512 * MiB, 10 * MiB))
    _, decisions = decided([at(111.0, short)], PROACTIVE, 111.0, looked(), replace(HOST, available_bytes=MiB))
    assert [step.purpose for step in decisions.steps] == [Purpose.EMERGENCY]
    assert [(warn.complaint, warn.vm) for warn in decisions.warnings] == [(Complaint.GUEST_SHORT, "a")]


def test_looks_are_rare_while_nothing_happens() -> None:
    allowed = limits({"a": config(mode="manual")})
    _, decisions = decided([VM], allowed, 100.0)
    assert decisions.look_again_s == 5.0
    _, decisions = decided([at(111.0)], PROACTIVE, 111.0, looked())
    assert decisions.look_again_s == 1.0
