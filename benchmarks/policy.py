"""Policy over time, on the model of guests and hosts that its tests use: no guest runs, and no memory is touched.

A guest whose use of its page cache changes in phases (drawn into docs/images), 1,000 VMs on one host (what deciding
costs, how far down they come), and the same host when others take its memory.
"""

from __future__ import annotations

import math
import statistics
from pathlib import Path

from benchmarks.figure import FOLDER, Figure, show
from benchmarks.policy_picture import Point, draw, seconds_over_budget
from hva_host.policy import shortage
from hva_host.policy.samples import Limits
from hvaqemu.pages import PAGE_SHIFT
from hvaqemu.reclaim_config import ReclaimConfig
from hvaqemu.units import GiB, MiB
from tests.policy.curves import turns
from tests.policy.model import Guest, Host, Moment, phased, play, typical

_MINUTE = 60.0
_PICTURE = Path("docs/images/policy.png")
_BUDGET = "1%/min"
_VMS = 1000
_CONVERGE_SECONDS, _LOOK_SECONDS = 20 * _MINUTE, 5.0
#: What the host is made to be short of.
_SHORT = 32 * GiB


def main() -> None:
    """Print the figures and draw the picture."""
    show("policy", _phases() + _thousand())


def _config(**keys: object) -> ReclaimConfig:
    return ReclaimConfig.model_validate(keys)


def _phases() -> list[Figure]:
    """A guest that uses other parts of its page cache from time to time."""
    guest, change, begins = phased()
    limits = Limits({guest.name: _config(mode="proactive", refault_budget=_BUDGET)})
    points = [
        Point(moment.now, moment.look.vms[0].backing_bytes, guest.active << PAGE_SHIFT, moment.decisions.views[0])
        for moment in play([guest], limits, begins[-1], each=change)
    ]
    title = f"A model guest of 512 MiB with phases, mode proactive, refault_budget {_BUDGET}"
    draw(points, begins[:-1], title, "really used (at least every 2 minutes)", [_PICTURE, FOLDER / "policy.png"])
    turned = turns([point.backing for point in points], 16 * MiB)
    return [
        Figure("phases: time above the refault budget, %", 100 * seconds_over_budget(points) / begins[-1]),
        Figure("phases: turns of backing of more than 16 MiB", turned, f"<= {2 * len(begins)}", "", "no oscillation"),
        Figure("phases: scans a minute", guest.scans / begins[-1] * _MINUTE),
    ]


def _thousand() -> list[Figure]:
    """1,000 VMs: half an hour in mode proactive, then a host that gets short."""
    guests = [typical(f"vm-{number}", number, busy=0.5 + number % 4) for number in range(_VMS)]
    limits = Limits({guest.name: _config(mode="proactive", refault_budget=_BUDGET) for guest in guests})
    host = Host(total=_VMS * 640 * MiB)
    before, used = _held(guests), sum(guest.active for guest in guests) << PAGE_SHIFT
    cpu, looks, above, moment = [], [], [], None
    for moment in play(guests, limits, _CONVERGE_SECONDS, host, every=_LOOK_SECONDS):
        cpu.append(moment.cpu_s)
        looks.append(moment.now)
        above.append(_above(moment))
    assert moment is not None
    after = _held(guests)
    host.others = host.total - after - shortage.available_least(host.total) + _SHORT
    seconds = steps = 0.0
    worst = 0.0
    for number, later in enumerate(play(guests, limits, 600.0, host, memory=moment.memory)):
        steps += len(later.decisions.steps)
        worst = max(worst, later.cpu_s)
        if number and not later.decisions.steps and math.isfinite(later.memory.host.calm_s):
            seconds = later.now - looks[-1]
            break
    apart = (looks[-1] - looks[0]) / (len(looks) - 1)
    return [
        Figure(
            "1,000 VMs: deciding once, ms of CPU",
            1e3 * statistics.mean(cpu),
            "<= 100",
            detail=f"most {1e3 * max(cpu):.0f}",
        ),
        Figure("1,000 VMs: deciding, % of a core", 100 * statistics.mean(cpu) / apart, "<= 2"),
        Figure("1,000 VMs: GiB held at first", before / GiB, detail=f"{used / GiB:.0f} GiB really used"),
        Figure(f"1,000 VMs: GiB held after {_CONVERGE_SECONDS / _MINUTE:.0f} minutes", after / GiB),
        Figure("1,000 VMs: of them above their refault budget, %", 100 * statistics.mean(above), "<= 10"),
        Figure("pressure: seconds until the host has enough", seconds, detail=f"{_SHORT / GiB:.0f} GiB short"),
        Figure("pressure: steps", steps, detail=f"deciding once at most {1e3 * worst:.0f} ms"),
    ]


def _held(guests: list[Guest]) -> int:
    return sum(guest.backing + guest.store for guest in guests)


def _above(moment: Moment) -> float:
    """Which share of the VMs is above its budget."""
    known = [
        view.refault_rate > view.budget
        for view in moment.decisions.views
        if view.refault_rate is not None and view.budget is not None
    ]
    return sum(known) / len(known) if known else 0.0
