"""The parts of a page that are words and numbers: what was saved and what it cost, steps, configuration, versions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from xml.etree.ElementTree import Element

import yaml

from hva_host.agent.model import Measure, Sample
from hva_host.report.html.elements import Part, element, table
from hva_host.report.html.shown import Shown
from hva_host.report.model import Outcome
from hva_host.report.table import Columns, columns
from hvaqemu.pages import PAGE_SIZE
from hvaqemu.units import format_duration, format_size

#: What guests and files say is cut here: letters of a text, lines of a list.
_LETTERS = 4000
_CONFIGURATION_LETTERS = 100_000
_LINES = 200

_OUTCOMES = {Outcome.OK: ("ok", "good"), Outcome.FAILED: ("FAILED", "bad"), Outcome.NOT_RUN: ("not run", "faint")}


def headline(shown: Shown) -> str:
    """What was saved and at what cost, in a sentence."""
    if len(shown.measures) >= 2:
        first, *rest = shown.measures.items()
        best = min(rest, key=lambda item: _occupied(item[1]))
        return _saved(shown, f"from {_size(first[1])} ({first[0]}) to {_size(best[1])} ({best[0]})", first[1], best[1])
    if not shown.timeline:
        return "The run ended before there was anything to measure."
    most = max(shown.timeline, key=_occupied)
    last = shown.timeline[-1]
    return _saved(shown, f"from at most {_size(most)} to {_size(last)}", most, last)


def _saved(shown: Shown, said: str, before: Measure | Sample, after: Measure | Sample) -> str:
    share = 1 - _occupied(after) / _occupied(before) if _occupied(before) else 0.0
    less = f"{share:.0%} less" if share >= 0 else f"{-share:.0%} more"
    waits = shown.stalls
    cost = "no vCPU waited for a page"
    if waits.count:
        cost = (
            f"for pages that came back vCPUs waited {waits.count:,} times, {format_duration(waits.sum_s)} in all, "
            f"at most {format_duration(waits.longest_s)}"
        )
    return f"Host memory behind the guest's RAM went {said}, {less}; {cost}."


def _occupied(found: Measure | Sample) -> int:
    return found.backing_bytes + found.store_memory_bytes


def _size(found: Measure | Sample) -> str:
    where = "" if found.store_cached_bytes is None else " on disk"
    store = f" with a store of {format_size(found.store_bytes)}{where}" if found.store_bytes else ""
    return f"{format_size(found.backing_bytes)}{store}"


def figures(shown: Shown) -> Element:
    """The numbers to begin with, large."""
    tiles: list[tuple[str, str]] = []
    if shown.timeline:
        least = min(shown.timeline, key=_occupied)
        most = max(shown.timeline, key=_occupied)
        tiles = [
            ("guest RAM", format_size(shown.memory)),
            ("most it occupied", format_size(_occupied(most))),
            ("least it occupied", format_size(_occupied(least))),
            ("came back", format_size(shown.timeline[-1].refault_pages * PAGE_SIZE)),
        ]
    if shown.stalls.count:
        tiles += [("median wait", format_duration(shown.stalls.median_s)), ("p99", format_duration(shown.stalls.p99_s))]
    tiles.append(("epochs", f"{len(shown.epochs):,}"))
    return element("dl", {"class": "tiles"}, *(_tile(name, value) for name, value in tiles))


def _tile(name: str, value: str) -> Element:
    return element("div", {}, element("dt", {}, name), element("dd", {}, value))


def costs(shown: Shown) -> list[Element]:
    """The table of measures: guest RAM on the host, and what it costs."""
    if not shown.measures:
        return [element("p", {"class": "note"}, "Nothing was measured.")]
    guest, cost = columns(shown.measures)
    return [
        element("h3", {}, "guest RAM on the host, MiB"),
        _measures(shown, guest),
        element("h3", {}, "what it costs the host, MiB"),
        _measures(shown, cost),
        element("p", {"class": "note"}, " ".join(_waits(shown))),
    ]


def _measures(shown: Shown, wanted: Columns) -> Element:
    head = ["measure", "at, s", *(title.replace("\n", " ") for title, _ in wanted)]
    rows = (
        [name, f"{measure.uptime_s:.1f}", *(cell(measure) for _, cell in wanted)]
        for name, measure in shown.measures.items()
    )
    return table(head, rows, "numbers")


def _waits(shown: Shown) -> Iterator[str]:
    yield (
        "QEMU own: its memory without guest RAM. Pager: what it shares divided by how many share it. Host agent: "
        "shared by all VMs. Layers cached: in the host's page cache, shared between VMs, and the host may drop it."
    )
    if shown.stalls.count and shown.timeline:
        seconds = shown.timeline[-1].at_s
        yield f"vCPUs waited {format_duration(shown.stalls.sum_s)} of {format_duration(seconds)}, all of them together."


def step_table(shown: Shown) -> list[Element]:
    """How each step went, and what failed."""
    parts: list[Element] = []
    if shown.failures:
        items = (element("li", {}, _cut(failure)) for failure in shown.failures[:_LINES])
        parts.append(element("ul", {"class": "failures"}, *items))
    if shown.console_tail:
        parts += [element("h3", {}, "the end of the guest's console"), _lines(shown.console_tail)]
    rows: list[list[Part]] = []
    for step in shown.steps[: 5 * _LINES]:
        word, look = _OUTCOMES[step.outcome]
        at = "-" if step.at_s is None else f"{step.at_s:.1f}"
        seconds = "-" if step.at_s is None else format_duration(step.seconds)
        outcome = element("span", {"class": look}, word)
        rows.append([str(step.number), outcome, _cut(step.title), at, seconds, _cut(step.figures)])
    if rows:
        parts.append(table(["step", "outcome", "what", "at, s", "took", "came of it"], rows, "steps"))
    for name, text in list(shown.saved.items())[:_LINES]:
        summary = element("summary", {}, f"what the guest printed: {name}")
        parts.append(element("details", {}, summary, element("pre", {}, _cut(text))))
    return parts


def configuration(shown: Shown) -> Element:
    """The exact configuration, as a file would have it."""
    text = yaml.safe_dump(dict(shown.configuration), sort_keys=False, allow_unicode=True, width=100)
    return element("pre", {"class": "configuration"}, _cut(text, _CONFIGURATION_LETTERS))


def versions(shown: Shown) -> Element:
    """Of what took part."""
    return table(["of", "version"], shown.versions.items(), "versions")


def _lines(lines: Sequence[str]) -> Element:
    return element("pre", {}, "\n".join(_cut(line) for line in lines[-_LINES:]))


def _cut(text: str, letters: int = _LETTERS) -> str:
    return text if len(text) <= letters else f"{text[:letters]}… ({len(text):,} letters)"
