"""What a lying guest costs the process that serves it, and the guest beside it."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Cost:
    """Of a while under one liar."""

    #: Of one core.
    cpu_share: float
    #: Bytes by which the process grew, from when it was ready for the liar to the most it had.
    growth: int
    #: Changes of the liar's state that were told, from the start.
    events: int
    #: Seconds the honest guest's signs of life took.
    median: float
    p99: float
    #: Scans of the honest guest that came out right.
    scans: int
    #: Bytes written to the log.
    logged: int
    #: The liar's last report.
    last: dict[str, Any]


@contextmanager
def _process(*words: str, log: Path | None = None) -> Iterator[subprocess.Popen[str]]:
    with ExitStack() as stack:
        stderr = stack.enter_context(log.open("w")) if log is not None else None
        process = stack.enter_context(
            subprocess.Popen(
                [sys.executable, "-m", *words], stdout=subprocess.PIPE, stderr=stderr, text=True, cwd=_ROOT
            )
        )
        stack.callback(process.kill)
        yield process


def measure(way: str, seconds: float, settle: float = 1.5) -> Cost:
    """Serve a guest that lies in one of ``tests.liars.guest.WAYS`` beside an honest one.

    :param settle: seconds before measuring: allowances are full at first, and meant to be used up.
    """
    with tempfile.TemporaryDirectory(prefix="hvliar") as name, ExitStack() as stack:
        folder = Path(name)
        for lie, place in ((way, "l"), ("honest", "h")):
            guest = stack.enter_context(_process("tests.liars.guest", lie, str(folder / place)))
            assert guest.stdout is not None
            assert guest.stdout.readline() == "listening\n"
        log = folder / "log"
        host = stack.enter_context(_process("tests.liars.host", str(folder / "l"), str(folder / "h"), log=log))
        assert host.stdout is not None
        reports: list[dict[str, Any]] = []
        while not reports or reports[-1]["at"] - reports[0]["at"] < settle + seconds:
            line = host.stdout.readline()
            assert line, f"the host's process ended: {log.read_text()[-2000:]}"
            reports.append(json.loads(line))
        measured = [report for report in reports if report["at"] - reports[0]["at"] >= settle]
        first, last = measured[0], measured[-1]
        waits = sorted(wait for report in measured[1:] for wait in report["waits"])
        assert waits, "the honest guest was never heard"
        return Cost(
            cpu_share=(last["cpu"] - first["cpu"]) / (last["at"] - first["at"]),
            growth=max(report["rss"] for report in reports) - reports[0]["rss"],
            events=last["events"],
            median=waits[len(waits) // 2],
            p99=waits[int(len(waits) * 0.99)],
            scans=last["scans"] - reports[0]["scans"],
            logged=log.stat().st_size,
            last=last,
        )
