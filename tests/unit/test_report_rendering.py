"""The report as table, JSON, picture and lines: complete, bounded, and the guest's text is only data."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from hva_host.agent.model import Measure, Sample
from hva_host.load.model import LoadResult
from hva_host.report.files import report_json, write_json
from hva_host.report.live import LiveProgress
from hva_host.report.model import Outcome, ScenarioReport, StepRecord
from hva_host.report.picture import draw
from hva_host.report.table import WIDE, report_text, saving
from hvaqemu.errors import HostError
from hvaqemu.units import MiB
from tests.unit.scenario_stand_ins import a_measure, a_sample, an_epoch

PNG = b"\x89PNG\r\n\x1a\n"


def a_step(
    number: int, verb: str, title: str, outcome: Outcome = Outcome.OK, at: float | None = 1.0, seconds: float = 0.5
) -> StepRecord:
    return StepRecord(number=number, verb=verb, title=title, outcome=outcome, at_s=at, seconds=seconds, figures="so")


def a_report(failures: list[str] | None = None, timeline: list[Sample] | None = None) -> ScenarioReport:
    return ScenarioReport(
        failures=failures or [],
        saved={"out": "\x1b[31m[bold]red[/bold]"},
        measures={"filled": a_measure(400 * MiB, 1.0), "reclaimed": a_measure(60 * MiB, 2.0)},
        steps=[
            a_step(1, "reclaim", "reclaim unused"),
            a_step(2, "reclaim", "reclaim unused every 200 ms", at=2.0),
            a_step(3, "reclaim", "reclaim stop", at=5.0),
            a_step(4, "same", "same [a], b", Outcome.FAILED if failures else Outcome.OK),
            a_step(5, "expect", "expect never", Outcome.NOT_RUN, at=None),
        ],
        epochs=[an_epoch(1, 1000), an_epoch(2, 500)],
        configuration={"source": "x.yaml", "scenario": {"vm": {"name": "vm", "memory": 512 * MiB}}},
        timeline=[a_sample(at / 2) for at in range(12)] if timeline is None else timeline,
        total_s=12.0,
    )


def test_json_says_its_verdict_first_and_comes_back_whole() -> None:
    report = a_report(["it broke"])
    text = report_json(report)
    assert text.startswith('{\n  "ok": false')
    data = json.loads(text)
    assert set(data["measures"]["filled"]) == set(Measure.model_fields)
    assert data.pop("ok") is False
    assert ScenarioReport.model_validate(data) == report


def test_json_that_can_not_be_written_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(HostError, match=r"missing/x\.json"):
        write_json(a_report(), tmp_path / "missing" / "x.json")


def test_saving() -> None:
    first, less, more = a_measure(400 * MiB), a_measure(60 * MiB), a_measure(500 * MiB)
    assert saving(first, first) == "-"
    assert saving(less, first) == "85 %"
    assert saving(more, first) == "-25 %"
    assert saving(less, a_measure(0)) == "-"


@pytest.mark.parametrize("width", [80, WIDE - 1, WIDE, 200])
def test_the_table_fits_and_holds_every_figure(width: int) -> None:
    text = report_text(a_report(), width)
    assert all(len(line) <= width for line in text.splitlines())
    figures = ("filled", "reclaimed", "400.0", "60.0", "85 %", "52.0", "20.0", "2.0", "1,234", "1,500", "10.0")
    for figure in figures:
        assert figure in text, figure
    assert "PASSED" in text
    assert "…" not in text


def test_the_store_counts_as_memory_and_has_its_columns() -> None:
    first = a_measure(400 * MiB)
    paged_out = a_measure(20 * MiB).model_copy(update={"preserved_pages": 30 * 256, "store_bytes": 10 * MiB})
    assert saving(paged_out, first) == "92 %"
    report = a_report().model_copy(update={"measures": {"filled": first, "reclaimed": paged_out}})
    for width in (80, WIDE):
        text = report_text(report, width)
        assert all(len(line) <= width for line in text.splitlines())
        assert all(figure in text for figure in ("paged", "30.0", "10.0", "92 %"))
    assert "paged" not in report_text(a_report(), 80)


def test_brackets_of_names_are_no_markup() -> None:
    assert "same [a], b" in report_text(a_report())


def test_a_failed_run_shows_why_and_no_pass() -> None:
    report = a_report(["step 4: it broke"]).model_copy(update={"console_tail": ["Kernel panic"]})
    text = report_text(report)
    assert "step 4: it broke" in text
    assert "Kernel panic" in text
    assert "FAIL" in text
    assert "PASSED" not in text
    # A check that was not run is neither ok nor failed.
    assert "expect never" not in text


def test_a_guest_that_did_not_answer_has_no_free_memory() -> None:
    report = a_report()
    silent = report.measures["filled"].model_copy(update={"guest_free_bytes": -1})
    text = report_text(report.model_copy(update={"measures": {"filled": silent}}))
    row = next(line for line in text.splitlines() if line.startswith("filled"))
    assert "-0.0" not in row
    assert row.split().count("-") == 2


def test_a_picture_of_anything() -> None:
    whole = draw(a_report())
    assert whole.startswith(PNG)
    blank = draw(a_report(timeline=[]))
    assert blank.startswith(PNG)
    # What the first shows takes more than a sentence.
    assert len(whole) > 2 * len(blank)
    still = [a_sample(at).model_copy(update={"states": {}, "refault_pages": 0}) for at in range(3)]
    assert draw(ScenarioReport(timeline=still)).startswith(PNG)
    # A pager started anew counts from zero, and a reclaim may never have been stopped.
    restarted = a_report(timeline=[a_sample(5), a_sample(0).model_copy(update={"at_s": 6.0}), a_sample(7)])
    endless = restarted.model_copy(update={"steps": [a_step(1, "reclaim", "reclaim unused every 1 s", at=5.5)]})
    assert draw(endless).startswith(PNG)


def shown(*, terminal: bool) -> str:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=100, color_system=None, legacy_windows=False)
    with LiveProgress(console) as progress:
        progress.say("booting [the] guest")
        progress.step_begins(1, 12, "guest: true [x]")
        progress.step_goes_on("epoch 1")
        progress.step_ended(a_step(1, "guest", "guest: true [x]"), 12)
        progress.step_ended(a_step(2, "guest", "guest: false", Outcome.NOT_RUN, at=None, seconds=0), 12)
    return out.getvalue()


def test_a_log_gets_one_line_a_step() -> None:
    lines = shown(terminal=False).splitlines()
    assert len(lines) == 3
    assert lines[0] == "booting [the] guest"
    assert lines[1].startswith("[ 1/12] ok   guest: true [x]")
    assert "500.0 ms  so" in lines[1]
    assert lines[2].startswith("[ 2/12] -    guest: false")


def test_a_terminal_gets_the_same_lines_and_a_spinner_that_goes_away() -> None:
    text = shown(terminal=True)
    assert "\x1b[?25l" in text
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")
    assert "[ 1/12] ok   guest: true [x]" in text


@pytest.mark.parametrize("width", [80, 200])
def test_loads_are_shown_whole(width: int) -> None:
    figures = {"seconds": 60.0, "requests": 1200, "right": 1195, "bytes": 9, "errors": {"wrong bytes": 5}}
    times = {"p50_s": 0.0123, "p99_s": 0.4321, "p999_s": 1.5, "longest_s": 1.9, "sent_late_p99_s": 0.0001}
    load = LoadResult.model_validate({"rate": 20.0, **figures, **times})
    report = a_report().model_copy(update={"loads": {"nothing": load, "proactive": load}})
    (shown,) = [line for line in report_text(report, width).splitlines() if line.startswith("proactive")]
    assert shown.split() == ["proactive", "19.9/s", "5", *["12.3", "ms", "432.1", "ms", "1.5", "s", "100", "µs"]]
    assert ScenarioReport.model_validate(json.loads(report.model_dump_json())) == report
