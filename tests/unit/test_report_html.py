"""The report as a page: well-formed, self-contained, bounded, and nothing that a guest said acts in it."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import zlib
from collections.abc import Sequence
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
import yaml

from hva_host.agent.model import PhaseSeconds, StallBucket, StallStats
from hva_host.agent.ram_frames import CELLS, RESIDENCES, STATES, RamFrame, packed
from hva_host.report.html.page import MOST, page
from hva_host.report.html.plot import Scale, round_step
from hva_host.report.html.shown import Shown, curves, of_run
from hva_host.report.model import Outcome, ScenarioReport
from hvaqemu.pages import Residence
from hvaqemu.units import MiB
from tests.unit.scenario_stand_ins import a_frame, a_measure, a_sample, an_epoch
from tests.unit.test_report_rendering import a_report, a_step

#: Elements that have no end.
VOID = {"meta", "input", "br"}
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(1)> \" ' & ]]> \x1b[31m \u202e \x00 \ud800"
BUCKETS = [StallBucket(upper_s=1e-5 * 2**power, count=10**power) for power in (0, 1, 4)]
STALLS = StallStats(count=10_011, sum_s=1.2, median_s=1e-5, p99_s=1.5e-4, longest_s=1.6e-4, buckets=BUCKETS)


class Page(HTMLParser):
    """A page, taken apart: what is not closed in order fails."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.source = text
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attributes]
        assert len(names) == len(set(names)), tag
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.setdefault(self.open[-1] if self.open else "", []).append(data)

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)

    @property
    def data(self) -> dict[str, Any]:
        """What the script gets."""
        content = re.search(r'<script type="application/json" id="data">(.*?)</script>', self.source, re.DOTALL)
        assert content is not None
        found: dict[str, Any] = json.loads(content[1])
        return found


def whole(**changes: Any) -> ScenarioReport:
    """A report with everything in it."""
    seconds = PhaseSeconds(scan=0.1, prove=0.2, total=0.3)
    report = a_report().model_copy(
        update={
            "stalls": STALLS,
            "ram": [a_frame(0.0).model_copy(update={"states": ""}), a_frame(2.0), a_frame(5.0)],
            "versions": {"QEMU": "7.2.0"},
            "epochs": [an_epoch(n).model_copy(update={"at_s": n, "seconds": seconds}) for n in (1, 2, 5)],
        }
    )
    return report.model_copy(update=changes)


def test_a_page_needs_nothing_but_itself() -> None:
    made = Page(page([of_run(whole())]))
    for tag, attributes in made.tags:
        assert not attributes.keys() & {"src", "href", "style", "action", "srcset", "xlink:href"}, tag
        assert not any(name.startswith("on") for name in attributes), tag
    assert not {tag for tag, _ in made.tags} & {"link", "img", "iframe", "object", "embed", "base", "form"}
    assert not re.search(r"https?:|url\(|@import|\bfetch\(|XMLHttpRequest|innerHTML|\beval\b", made.source)
    policy = next(a["content"] for tag, a in made.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none';")
    assert "unsafe" not in policy
    # A browser runs and applies exactly what the policy names.
    for tag in ("style", "script"):
        content = re.search(rf"<{tag}>(.*?)</{tag}>", made.source, re.DOTALL)
        assert content is not None
        digest = base64.b64encode(hashlib.sha256(content[1].encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy


def test_every_figure_says_what_it_shows_in_words_and_as_a_table() -> None:
    made = Page(page([of_run(whole())]))
    identifiers = [attributes["id"] for _, attributes in made.tags if "id" in attributes]
    assert len(identifiers) == len(set(identifiers))
    plots = [attributes for tag, attributes in made.tags if tag == "svg"]
    assert len(plots) == 4
    for attributes in plots:
        assert attributes["role"] == "img"
        assert all(name in identifiers for name in str(attributes["aria-labelledby"]).split())
    assert made.count("details") == len(plots) + 1
    assert made.count("canvas") == 1
    words = " ".join(made.texts["p"])
    assert "from 400.0 MiB (filled) to 60.0 MiB (reclaimed), 85% less" in words
    assert "vCPUs waited 10,011 times, 1.2 s in all, at most 160 µs" in words


def test_the_configuration_is_exact() -> None:
    report = whole()
    made = Page(page([of_run(report)]))
    texts = [text for text in made.texts["pre"] if text.startswith("source:")]
    assert yaml.safe_load(texts[0]) == report.configuration


def test_nothing_a_guest_says_acts() -> None:
    step = a_step(1, "guest", HOSTILE, Outcome.FAILED)
    report = whole(
        failures=[HOSTILE],
        saved={HOSTILE: HOSTILE},
        steps=[step.model_copy(update={"figures": HOSTILE})],
        measures={HOSTILE: a_measure(), "b": a_measure()},
        versions={"guest kernel": HOSTILE},
        console_tail=[HOSTILE],
        epochs=[an_epoch(1).model_copy(update={"note": HOSTILE})],
        configuration={"source": HOSTILE, "scenario": {"vm": {"name": HOSTILE, "memory": 512 * MiB}}},
    )
    for reports in ([of_run(report)], [of_run(report), of_run(report, HOSTILE)]):
        text = page(reports)
        text.encode()
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202e\ud800]", text)
        made = Page(text)
        assert made.count("img") == 0
        assert made.count("script") == 2
        assert "\\x1b[31m" in " ".join(made.texts["td"])
        assert r"\u202e" in " ".join(made.texts["pre"])


def _noise(generator: np.random.Generator, at: float) -> RamFrame:
    """A map that does not compress."""
    made = [generator.integers(0, 60, (rows, CELLS)).astype(np.uint8) for rows in (len(RESIDENCES), len(STATES))]
    return RamFrame(at_s=at, cells=CELLS, residence=packed(made[0]), states=packed(made[1]))


def test_a_long_run_stays_small() -> None:
    generator = np.random.default_rng(1)
    samples = [
        a_sample(at * 7.0).model_copy(update={"backing_bytes": int(generator.integers(0, 512)) * MiB})
        for at in range(2048)
    ]
    report = whole(
        timeline=samples,
        ram=[_noise(generator, at * 112.0) for at in range(128)],
        epochs=[an_epoch(number).model_copy(update={"at_s": number * 4.0}) for number in range(1, 3000)],
        steps=[a_step(number, "guest", "guest: true " * 20) for number in range(1, 3000)],
        measures={f"measure-{number}": a_measure(uptime=number * 70.0) for number in range(200)},
        saved={f"out-{number}": "x" * (1 << 20) for number in range(8)},
        console_tail=["y" * 100_000] * 20,
    )
    text = page([of_run(report)])
    Page(text)
    assert len(text.encode()) < 1.5 * (1 << 20)


def test_no_peak_is_lost_where_points_are_left_out() -> None:
    samples = [a_sample(at) for at in range(5000)]
    samples[1234] = samples[1234].model_copy(update={"backing_bytes": 500 * MiB})
    samples[2345] = samples[2345].model_copy(update={"backing_bytes": 1 * MiB})
    made = curves(samples)
    assert len(made.at) < 1000
    assert (made.residences["resident"].max(), made.residences["resident"].min()) == (500, 1)
    assert (made.at[0], made.at[-1]) == (0, 4999)


def test_the_script_gets_the_maps_as_they_are() -> None:
    report = whole()
    (found,) = Page(page([of_run(report)])).data["maps"].values()
    shape = (len(report.ram), len(RESIDENCES), found["cells"])
    raw = zlib.decompress(base64.b64decode(found["residence"]["shares"]))
    assert np.array_equal(np.frombuffer(raw, np.uint8).reshape(shape), [f.residence_shares() for f in report.ram])
    assert found["states"]["known"] == [0, 1, 1]
    assert [name for _, name in found["residence"]["kinds"][:4]] == [kind.name for kind in RESIDENCES]
    assert RESIDENCES[0] == Residence.RESIDENT
    assert [name for _, name in found["states"]["kinds"][:3]] == [state.name for state in STATES]


@pytest.mark.parametrize(
    "report",
    [
        ScenarioReport(failures=["it never began"]),
        ScenarioReport(timeline=[a_sample(1.0)]),
        whole(measures={}, epochs=[], ram=[], stalls=StallStats(count=3)),
        whole(timeline=[a_sample(1.0).model_copy(update={"backing_bytes": 0, "states": {}})] * 2),
        whole(stalls=StallStats(count=1, buckets=[StallBucket(upper_s=1e-7, count=1)])),
    ],
    ids=["nothing", "one sample", "no measure", "nothing happens", "one wait"],
)
def test_a_page_of_anything(report: ScenarioReport) -> None:
    made = Page(page([of_run(report)]))
    assert "NaN" not in made.source
    assert "nan" not in made.texts.get("td", [])


def test_several_reports_side_by_side() -> None:
    reports = [of_run(whole(), name) for name in ("none", "balloon", "hva")]
    made = Page(page(reports, "three methods"))
    assert made.texts["h1"] == ["three methods"]
    lines = [attributes["class"] for tag, attributes in made.tags if tag == "polyline"]
    assert lines == ["line-1", "line-2", "line-3"] * 2
    assert made.count("canvas") == 3
    assert len(made.data["timelines"]) == 3
    # The same time and the same colours everywhere.
    assert len({tuple(found["time"]) for found in (*made.data["maps"].values(), *made.data["timelines"].values())}) == 1
    empty = Shown("free-page-reporting", "not working on this guest", False, 0)
    Page(page([*reports, empty]))
    identifiers = [attributes["id"] for _, attributes in made.tags if "id" in attributes]
    assert len(identifiers) == len(set(identifiers))
    for wrong in ([], [empty] * (MOST + 1)):
        with pytest.raises(ValueError, match="reports"):
            page(wrong)


@pytest.mark.parametrize(
    ("scale", "ticks"),
    [
        (Scale(0, 10, 0, 1), [0, 2, 4, 6, 8, 10]),
        (Scale(9.6, 31, 0, 1), [10, 15, 20, 25, 30]),
        (Scale(0.0, 0.003, 0, 1), [0, 0.001, 0.002, 0.003]),
        (Scale(5, 5, 0, 1), [5]),
    ],
)
def test_ticks_are_round(scale: Scale, ticks: Sequence[float]) -> None:
    assert scale.ticks(5) == pytest.approx(ticks)
    assert round_step(2.1) == 5
