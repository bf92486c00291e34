"""The figures of a comparison: from when to when, relative to what, and what is not known stays unknown."""

from __future__ import annotations

import pytest

from hva_host.agent.model import Measure, Sample
from hva_host.compare.figures import Figures, compared
from hva_host.compare.method import Begin, Method
from hva_host.compare.model import ComparisonReport, CpuSeconds, GuestCounters, GuestPoint, MethodRun
from hva_host.compare.rows import rows
from hva_host.compare.window import Fall, fall_of, reclaiming
from hva_host.report.model import Outcome, ScenarioReport, StepRecord
from hvaqemu.units import MiB
from tests.unit.compare_stand_ins import a_timeline
from tests.unit.scenario_stand_ins import a_measure
from tests.unit.test_report_rendering import a_step

#: 400 MiB until the reclaim at 10 s, then down to 100 within 4 s; a command at 20 s brings 300 back.
TIMELINE = a_timeline((0, 100), (8, 400), (10, 400), (12, 200), (14, 104), (16, 100), (20, 100), (22, 300), (30, 300))
STEPS = (
    a_step(1, "guest", "guest: fill", at=1.0, seconds=7.0),
    a_step(2, "reclaim", "reclaim unused", at=10.0, seconds=5.0),
    a_step(3, "measure", "measure m", at=16.0),
    a_step(4, "guest", "guest: again", at=20.0, seconds=10.0),
)
BY_STEP, BESIDE, ALWAYS = Begin(step=2, beside=False), Begin(step=2), Begin()


def a_run(
    method: Method = Method.HVA,
    timeline: list[Sample] = TIMELINE,
    steps: tuple[StepRecord, ...] = STEPS,
    guest: tuple[GuestPoint, ...] = (),
    begin: Begin = BY_STEP,
) -> MethodRun:
    report = ScenarioReport(timeline=timeline, steps=list(steps), measures={"m": a_measure(100 * MiB)})
    return MethodRun(method=method, report=report, guest=list(guest), begin=begin)


def figures_of(run: MethodRun) -> Figures:
    (found,) = compared([run]).figures
    assert found is not None
    return found


def fall(begin: Begin, *points: tuple[float, int]) -> Fall:
    found = fall_of(a_run(timeline=a_timeline(*points), begin=begin))
    assert found is not None
    return found


def test_the_way_to_the_least_ends_before_the_guest_works_again() -> None:
    assert reclaiming(a_run()) == (10.0, 20.0)
    figures = figures_of(a_run())
    # 104 is within 5 % of 100.
    assert (figures.least_bytes, figures.seconds_to_least) == (100 * MiB, 4.0)
    assert figures.memory == {"m": 100 * MiB}


def test_what_goes_on_beside_commands_has_until_the_end() -> None:
    assert reclaiming(a_run(begin=BESIDE)) == (10.0, 30.0)
    assert reclaiming(a_run(begin=ALWAYS)) == (0.0, 30.0)
    # It did not come to the step, or nothing was seen.
    assert reclaiming(a_run(steps=STEPS[:1])) is None
    assert reclaiming(a_run(timeline=[])) is None


def test_under_a_policy_the_most_may_come_after_the_least() -> None:
    found = fall(ALWAYS, (0, 100), (4, 400), (6, 100), (20, 420), (22, 410))
    assert (found.least, found.since, found.seconds_to_least) == (100 * MiB, 4.0, 2.0)
    # A guest that has just booted has least, and nobody took anything by then.
    found = fall(ALWAYS, (0, 60), (4, 400), (5, 400), (7, 150), (9, 155), (20, 300))
    assert (found.least, found.since, found.seconds_to_least) == (150 * MiB, 5.0, 2.0)


def test_what_went_before_the_next_sample_is_seen() -> None:
    found = fall(BY_STEP, (0, 100), (9.9, 400), (10.4, 100), (12, 100))
    assert found.seconds_to_least == pytest.approx(0.4)


def test_where_nothing_goes_there_is_no_way() -> None:
    found = fall(BY_STEP, (0, 100), (9, 400), (12, 390), (20, 390), (25, 200))
    assert (found.least, found.seconds_to_least) == (390 * MiB, None)
    found = fall(ALWAYS, (0, 100), (9, 400), (12, 390))
    assert (found.least, found.seconds_to_least) == (390 * MiB, None)


def seconds_to_level(*runs: MethodRun) -> tuple[float | None, list[float | None]]:
    level, figures = compared(runs)
    return level.bytes / MiB if level else None, [each.seconds_to_level for each in figures if each is not None]


def test_all_are_timed_to_one_size() -> None:
    none = a_run(Method.NONE, a_timeline((0, 100), (9, 400), (20, 400)))
    balloon = a_run(Method.BALLOON, a_timeline((9, 400), (12, 300), (17, 200), (20, 200)))
    hva = a_run(Method.HVA, a_timeline((9, 400), (10.5, 205), (13, 100), (20, 100)))
    assert seconds_to_level(none, balloon, hva) == (210, [None, 7.0, 0.5])
    # Without a balloon that took anything: half of what a guest has of which nothing is taken.
    assert seconds_to_level(none, hva) == (200, [None, 3.0])
    idle = a_run(Method.BALLOON, a_timeline((9, 400), (20, 400)))
    assert seconds_to_level(none, idle, hva) == (200, [None, None, 3.0])
    assert seconds_to_level(hva) == (None, [None])


def a_word(at: float, free: int, available: int | None) -> GuestPoint:
    return GuestPoint(
        at_s=at, free_bytes=free, available_bytes=available, least_free_bytes=free, least_available_bytes=available
    )


def test_what_the_guest_had_least_counts_from_the_reclaim_on() -> None:
    guest = (
        a_word(5.0, 1, 1),
        # Of the words after it that have no point of their own, one said less.
        a_word(11.0, 50, 100).with_next(a_word(11.5, 30, 90)),
        a_word(25.0, 40, None),
    )
    figures = figures_of(a_run(guest=guest))
    assert (figures.least_free_bytes, figures.least_available_bytes) == (30, 90)


def slower(factor: float, *numbers: int) -> tuple[StepRecord, ...]:
    return tuple(
        step.model_copy(update={"seconds": step.seconds * factor}) if step.number in numbers else step for step in STEPS
    )


def slowdowns(*runs: MethodRun) -> list[float | None]:
    return [each.slowdown if each is not None else None for each in compared(runs).figures]


def test_slowdown_is_that_of_the_same_work_after_the_reclaim() -> None:
    cut = (*STEPS[:3], STEPS[3].model_copy(update={"outcome": Outcome.FAILED}))
    found = slowdowns(a_run(steps=slower(1.5, 4)), a_run(Method.BALLOON, steps=cut), a_run(Method.NONE))
    # The second did not do all of the work: nothing to compare.
    assert found == [pytest.approx(1.5), None, 1.0]
    # What came before the reclaim is no method's doing.
    assert slowdowns(a_run(steps=slower(3.0, 1)), a_run(Method.NONE)) == [1.0, 1.0]
    # With steps of its own the same work has other numbers.
    renumbered = (
        STEPS[0],
        a_step(2, "same", "same a, b"),
        *(s.model_copy(update={"number": s.number + 1}) for s in STEPS[1:]),
    )
    shifted = a_run(steps=renumbered, begin=Begin(step=3, beside=False))
    assert slowdowns(shifted, a_run(Method.NONE)) == [1.0, 1.0]
    # A policy is at work all the time.
    always = a_run(steps=slower(1.5, 1, 4), begin=ALWAYS), a_run(Method.NONE, begin=ALWAYS)
    assert slowdowns(*always) == [pytest.approx(1.5), 1.0]
    assert slowdowns(a_run(), MethodRun(method=Method.NONE, error="no")) == [None, None]


def with_ends(run: MethodRun, last: Measure | None, counters: GuestCounters | None = None) -> MethodRun:
    first = a_measure(uptime=2.0).model_copy(update={"qemu_cpu_s": 5.0, "pager_cpu_s": 0.5, "agent_cpu_s": 40.0})
    return run.model_copy(update={"first": first, "last": last, "counters": counters})


def test_the_figures_of_the_end_are_of_one_moment() -> None:
    last = a_measure(70 * MiB, uptime=42.0).model_copy(
        update={
            "qemu_cpu_s": 11.0,
            "pager_cpu_s": 1.0,
            "agent_cpu_s": 43.5,
            "store_bytes": 9 * MiB,
            "zero_refaults": 5,
            "layer_refaults": 6,
            "preserved_refaults": 7,
            "first_touches": 8,
        }
    )
    counters = GuestCounters(refault_file=1234, refault_anon=3, major_faults=77)
    runs = [with_ends(a_run(), last, counters), with_ends(a_run(Method.NONE), None)]
    figures, unknown = compared(runs).figures
    assert figures is not None
    assert figures.seconds == 40.0
    assert figures.cpu == CpuSeconds(qemu=6.0, pager=0.5, agent=3.5)
    assert figures.cpu_share == pytest.approx(0.25)
    shown = {row.name: row.cells for row in rows(ComparisonReport(source="x", runs=runs))}
    assert {name: shown[name] for name in shown if name.startswith("at the end")} == {
        "at the end: backing, MiB": ["70.0", "-"],
        "at the end: store, MiB": ["9.0", "-"],
        "at the end: QEMU itself, MiB": ["52.0", "-"],
        "at the end: pager, MiB": ["20.0", "-"],
        "at the end: host agent, MiB": ["60.0", "-"],
        "at the end: layers cached, MiB": ["400.0", "-"],
    }
    assert [shown[name] for name in shown if "refaults" in name] == [
        ["1,234", "-"],
        ["3", "-"],
        ["13", "-"],
        ["5", "-"],
    ]
    assert shown["guest's major faults"] == ["77", "-"]
    assert shown["host CPU, of a core"] == ["25.0%", "-"]
    assert unknown is not None
    assert (unknown.cpu, unknown.seconds, unknown.end) == (None, None, None)


def test_a_pager_that_was_replaced_took_its_time_with_it() -> None:
    last = a_measure(uptime=42.0).model_copy(update={"qemu_cpu_s": 6.0, "pager_cpu_s": 0.1, "agent_cpu_s": 41.0})
    figures = figures_of(with_ends(a_run(), last))
    assert figures.cpu == CpuSeconds(qemu=1.0, pager=0.0, agent=1.0)


def test_the_store_is_shown_beside_the_sum_where_there_is_one() -> None:
    run = a_run()
    assert run.report is not None
    stored = a_measure(100 * MiB).model_copy(update={"store_bytes": 20 * MiB})
    report = run.report.model_copy(update={"measures": {"m": stored}})
    shown = {
        row.name: row.cells
        for row in rows(ComparisonReport(source="x", runs=[run.model_copy(update={"report": report})]))
    }
    assert shown["memory at m, MiB"] == ["120.0"]
    assert shown["of that the store, MiB"] == ["20.0"]
    assert "of that the store, MiB" not in {row.name for row in rows(ComparisonReport(source="x", runs=[run]))}
