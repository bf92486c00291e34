"""A real guest whose use of its page cache changes in phases, in mode proactive: what is taken, and what comes back.

Phases change every two minutes (HVABENCH_PHASE_SECONDS). What policy saw is recorded beside the figures, so that it can
be decided on again: ``report/bench/phases.jsonl``.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.figure import FOLDER, Figure, show
from benchmarks.policy_picture import Point, draw, seconds_over_budget
from hva_host.agent.fleet import Fleet
from hva_host.agent.vm import Vm
from hva_host.policy import trace
from hva_host.policy.decisions import Decisions
from hva_host.policy.samples import Look
from hvaqemu.config import VmConfig
from hvaqemu.reclaim_config import ReclaimConfig, ReclaimMode
from hvaqemu.units import MiB
from tests.policy.curves import turns

SECONDS = float(os.environ.get("HVABENCH_PHASE_SECONDS", "120"))
_PICTURE = Path("docs/images/phases.png")
_TRACE = FOLDER / "phases.jsonl"
_BUDGET = "1%/min"
#: A tenth of the files, and all of them.
_LISTS = (
    "cd /run && find /usr -xdev -type f >all && awk 'NR % 10 == 0' all >some && "
    "for f in some all; do xargs cat <$f | wc -c; done"
)
_READ = (
    "end=$(($(cut -d. -f1 /proc/uptime) + {seconds})); n=0; while [ $(cut -d. -f1 /proc/uptime) -lt $end ]; do "
    "xargs cat </run/{list} >/dev/null; sleep 2; n=$((n + 1)); done; echo $n"
)
#: What is read again and again; "" for nothing.
_PHASES = ("", "some", "all", "some", "")


@dataclass
class _Watch:
    """What policy saw and thought."""

    began: float
    used: int
    points: list[Point]
    lines: list[str]

    def decided(self, now: float, look: Look, decisions: Decisions) -> None:
        """Remember one look."""
        if look.vms and decisions.views:
            self.points.append(Point(now - self.began, look.vms[0].backing_bytes, self.used, decisions.views[0]))
            self.lines.append(trace.dump(now, look))


def main() -> None:
    """Boot a guest, go through the phases, draw what came of it."""
    show("phases", asyncio.run(_measure()))


async def _measure() -> list[Figure]:
    with tempfile.TemporaryDirectory(prefix="hvaphases") as folder:
        fleet = Fleet(Path(folder), embedded=True)
        try:
            reclaim = ReclaimConfig.model_validate({"mode": ReclaimMode.MANUAL, "refault_budget": _BUDGET})
            vm = await fleet.up(
                VmConfig(name="phases", memory=512 * MiB, allow_exec=True, reclaim=reclaim), lambda _line: None
            )
            return await _phases(fleet, vm)
        finally:
            await fleet.close()


async def _phases(fleet: Fleet, vm: Vm) -> list[Figure]:
    some, everything = map(int, (await vm.execute(["sh", "-c", _LISTS], timeout=300)).stdout.split())
    base = (await vm.measure()).backing_bytes - everything
    used = {"": base, "some": base + some, "all": base + everything}
    watch = _Watch(time.monotonic(), base, [], [trace.header()])
    fleet.governor.on_decided = watch.decided
    vm.set_reclaim(vm.config.reclaim.model_copy(update={"mode": ReclaimMode.PROACTIVE}))
    fleet.governor.poke()
    figures, begins, waited = [], [], await _waited(vm)
    for number, read in enumerate(_PHASES, 1):
        begins.append(time.monotonic() - watch.began)
        watch.used = used[read]
        rounds = "0"
        if read:
            command = _READ.format(seconds=round(SECONDS), list=read)
            rounds = (await vm.execute(["sh", "-c", command], timeout=SECONDS + 120)).stdout.decode().strip()
        else:
            await asyncio.sleep(SECONDS)
        backing, now = (await vm.measure()).backing_bytes, await _waited(vm)
        what = f"phase {number}, {read or 'nothing'} is read: backing at its end, MiB"
        detail = f"really used {used[read] / MiB:.0f}; read {rounds} times; vCPUs waited {now - waited:.2f} s"
        figures.append(Figure(what, backing / MiB, detail=detail))
        waited = now
    fleet.governor.on_decided = None
    FOLDER.mkdir(parents=True, exist_ok=True)
    _TRACE.write_text("\n".join(watch.lines) + "\n")
    title = f"A real guest of 512 MiB with phases, mode proactive, refault_budget {_BUDGET}"
    draw(watch.points, begins, title, "kernel, programs and what is read", [_PICTURE, FOLDER / "phases.png"])
    turned = turns([point.backing for point in watch.points], 16 * MiB)
    whole = watch.points[-1].at_s - watch.points[0].at_s
    return [
        *figures,
        Figure("time above the refault budget, %", 100 * seconds_over_budget(watch.points) / whole),
        Figure("turns of backing of more than 16 MiB", turned, f"<= {2 * len(begins)}", "", "no oscillation"),
    ]


async def _waited(vm: Vm) -> float:
    """Seconds that vCPUs have waited for pages."""
    return (await vm.status()).stalls.sum_s
