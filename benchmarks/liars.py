"""What a guest that lies or floods costs the process that serves it, and the honest guest beside it."""

from __future__ import annotations

from benchmarks.figure import Figure, show
from hvaqemu.units import MiB
from tests.liars.guest import WAYS
from tests.liars.measure import measure

_SECONDS = 4.0
#: Long enough for ten thousand agents, one after the other, at the rate they are listened to.
_MORE = {"restarts": 30.0}
_PAUSE = 2.0


def main() -> None:
    """Serve each liar for a while."""
    alone = measure("honest", _SECONDS, _PAUSE)
    figures = [
        Figure("two honest guests: CPU, % of a core", alone.cpu_share * 100, "", "",
               f"sign of life {alone.median * 1e3:.2f} ms, p99 {alone.p99 * 1e3:.1f} ms"),
    ]  # fmt: skip
    for way in WAYS:
        if way == "honest":
            continue
        cost = measure(way, _MORE.get(way, _SECONDS), _PAUSE)
        figures.append(
            Figure(
                f"{way}: CPU, % of a core",
                cost.cpu_share * 100,
                "<= 15",
                "",
                f"grew {cost.growth / MiB:.1f} MiB; beside it {cost.median * 1e3:.2f} ms, p99 {cost.p99 * 1e3:.1f} ms; "
                f"{cost.events} changes told",
            )
        )
        if way in _MORE:
            figures.append(Figure(f"{way}: greetings of agents heard", cost.last["counters"]["greetings"], ">= 10000"))
    show("liars", figures)
