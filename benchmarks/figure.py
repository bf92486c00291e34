"""A figure with what it is compared to."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

FOLDER = Path("report/bench")


@dataclass(frozen=True)
class Figure:
    """One measured figure. ``reach`` is a bound of ``value`` ("<= 1.5", ">= 0.15"), or "" where it is only shown."""

    what: str
    value: float
    reach: str = ""
    limit: str = ""
    detail: str = ""

    @property
    def reached(self) -> bool | None:
        """Whether ``value`` keeps its bound; None where there is none."""
        if not self.reach:
            return None
        sign, bound = self.reach.split()
        return self.value <= float(bound) if sign == "<=" else self.value >= float(bound)


def show(name: str, figures: list[Figure]) -> None:
    """Print figures as a table and keep them as JSON."""
    table = Table(title=name, title_justify="left")
    for column in ("what", "measured", "reach", "limit", "detail"):
        table.add_column(column, overflow="fold")
    for figure in figures:
        verdict = {True: "[green]", False: "[bold red]", None: ""}[figure.reached]
        table.add_row(figure.what, f"{verdict}{figure.value:.3g}", figure.reach, figure.limit, figure.detail)
    Console(width=140).print(table)
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / f"{name}.json").write_text(json.dumps([asdict(figure) for figure in figures], indent=1))


def seconds(work: Callable[[], object], repeat: int = 5) -> float:
    """The shortest of ``repeat`` runs of ``work``: what disturbs a run only ever makes it longer."""
    found = []
    for _ in range(repeat):
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    return min(found)


def median_us(times: list[float]) -> float:
    """Median of seconds, in microseconds."""
    return statistics.median(times) * 1e6
