"""A scenario under every method, on real guests; and what free page reporting is kept away from."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from hva_host.agent.model import VmState
from hva_host.compare import probe
from hva_host.compare.figures import Figures, compared
from hva_host.compare.files import write_comparison
from hva_host.compare.method import Method
from hva_host.compare.model import ComparisonReport, MethodRun
from hvaqemu.config import BalloonConfig
from hvaqemu.errors import RefusedError
from hvaqemu.reclaim_config import ReclaimConfig, ReclaimMode
from hvaqemu.scenario_config import Scenario
from hvaqemu.units import MiB
from tests.unit.compare_stand_ins import compare
from tests.unit.scenario_stand_ins import Remembering
from tests.vm.harness import BOOT_SECONDS, BOTH, STEP_SECONDS, nothing_left, running_guest, until

pytestmark = pytest.mark.timeout(2400)

_READ = "find /usr/lib -xdev -type f -size -2M -print0 | sort -z | xargs -0 md5sum | md5sum"
#: Takes more than the balloon leaves free, and says that it held what was put there.
_DEMAND = """
import time
blocks = []
for number in range(12):
    blocks.append(bytes([number + 1]) * (8 << 20))
    time.sleep(0.15)
print(all(block == bytes([number + 1]) * (8 << 20) for number, block in enumerate(blocks)))
"""
_STEPS = [
    {"guest": _READ, "save": "before", "timeout": "300s"},
    {"measure": "filled"},
    {"reclaim": {"states": ["unused", "volatile"]}},
    {"measure": "reclaimed"},
    {"guest": f"python3 -B - <<'END'\n{_DEMAND}\nEND\n", "save": "held", "timeout": "120s"},
    {"measure": "grown"},
    # Soon after the balloon grew, and once more when it had all of it back.
    {"reclaim": {"states": ["unused", "volatile"]}},
    {"measure": "again"},
    {"restore": None},
    {"reclaim": {"states": ["unused", "volatile"]}},
    {"measure": "restored"},
    {"balloon": "128M"},
    {"guest": _READ, "save": "after", "timeout": "300s"},
    {"same": ["before", "after"]},
    {"expect": {"measure": "reclaimed", "backing": {"of": "filled", "max_ratio": 0.5}}},
]


def scenario() -> Scenario:
    vm = {"name": "compared", "memory": "256M", "cpus": 2, "allow_exec": True, "boot_timeout": BOOT_SECONDS}
    return Scenario.model_validate({"vm": vm, "steps": _STEPS})


def of(report: ComparisonReport, method: Method) -> tuple[MethodRun, Figures]:
    found = zip(report.runs, compared(report.runs).figures, strict=True)
    run, figures = next((run, figures) for run, figures in found if run.method is method)
    assert figures is not None
    return run, figures


def available_at(run: MethodRun, measure: str) -> int:
    """Bytes that the guest last said to have available when that was measured."""
    assert run.report is not None
    at = next(step.at_s for step in run.report.steps if step.title == f"measure {measure}")
    assert at is not None
    said = [point.available_bytes for point in run.guest if point.at_s <= at]
    assert said[-1] is not None
    return said[-1]


async def test_every_method_does_the_same_work_its_own_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A guest that is only slow at its memory is to be found out about, too.
    monkeypatch.setattr(probe, "_COMMAND_SECONDS", 300.0)
    progress = Remembering()
    report = await compare(scenario(), list(Method), source=Path("test.yaml"), progress=progress)
    assert report.ok, "\n".join(progress.said)
    await nothing_left("compared")
    assert all(run.left_out[0] == "balloon 128 MiB" for run in report.runs)
    reports = {run.method: run.report for run in report.runs}
    saved = {method: each.saved for method, each in reports.items() if each is not None and not each.failures}
    assert {Method.NONE, Method.BALLOON, Method.HVA} <= saved.keys()
    assert len({text for each in saved.values() for text in (each["before"], each["after"])}) == 1
    assert {each["held"] for each in saved.values()} == {"True\n"}

    none_run, none = of(report, Method.NONE)
    balloon_run, balloon = of(report, Method.BALLOON)
    hva_run, hva = of(report, Method.HVA)
    filled = none.memory["filled"]
    assert none.memory["reclaimed"] > 0.95 * filled
    assert none.seconds_to_least is None
    assert none.end is not None
    assert balloon.end is not None
    assert hva.end is not None
    assert none.end.content_refaults == balloon.end.content_refaults == 0
    assert hva.memory["reclaimed"] < 0.5 * filled
    assert hva.end.content_refaults > 0
    # The balloon took much, left the guest its reserve, and gave it back when the guest wanted it.
    assert balloon.memory["reclaimed"] < 0.8 * filled
    assert balloon.memory["grown"] > balloon.memory["reclaimed"] + 60 * MiB
    assert balloon.memory["again"] < balloon.memory["grown"] - 40 * MiB
    # `restore` gave the guest all of it, and the balloon has taken it once more.
    assert available_at(balloon_run, "restored") < 80 * MiB < available_at(none_run, "restored")
    assert min(balloon.guest_free["reclaimed"], hva.guest_free["reclaimed"]) > 0
    assert [run.oom_kills for run in (none_run, balloon_run, hva_run)] == [0, 0, 0]
    # The guest's driver says something every second where it has a processor, all the time.
    for run, figures in map(partial(of, report), Method):
        assert figures.seconds is not None
        assert len(run.guest) > figures.seconds / 5
        assert figures.cpu is not None
        assert figures.cpu.qemu > 0
        assert run.counters is not None
        # One that does not work may not even do the work.
        assert run.broken or figures.slowdown is not None
    # All that the balloon took, it took of the page cache: the guest reads its programs again.
    assert balloon_run.counters is not None
    assert none_run.counters is not None
    assert balloon_run.counters.refault_file > 0
    assert balloon_run.counters.major_faults > none_run.counters.major_faults
    assert balloon.seconds_to_level is not None
    assert hva.seconds_to_level is not None

    # Whether it works was found out; on this QEMU and guest it does not.
    reporting = next(run for run in report.runs if run.method is Method.FREE_PAGE_REPORTING)
    assert reporting.probe is not None
    assert reporting.probe.works is False, f"docs and FACTS say that it does not work here: {reporting.probe.why}"
    written = {path.name: path.read_bytes() for path in write_comparison(report, tmp_path)}
    assert b"not working on this guest" in written["report.html"]
    assert b"(free-page-reporting)" in written["comparison.txt"]


async def test_a_vm_that_reports_its_free_pages_is_never_reclaimed() -> None:
    off = ReclaimConfig(mode=ReclaimMode.OFF)
    balloon = BalloonConfig(free_page_reporting=True)
    async with running_guest("reports", memory=256 * MiB, reclaim=off, balloon=balloon) as guest:
        vm = guest.vm
        with pytest.raises(RefusedError, match="VM reports: reclaim is off: its guest reports free pages"):
            await vm.reclaim(BOTH, epochs=1)
        with pytest.raises(RefusedError, match="reports free pages"):
            vm.start_reclaiming(BOTH, 1.0)
        with pytest.raises(RefusedError, match="reports free pages"):
            guest.fleet.set_reclaim("reports", ReclaimConfig(mode=ReclaimMode.PROACTIVE))
        assert vm.config.reclaim == off
        # Whoever gets past all that is refused by what QEMU says of itself, as any other VM with such a balloon.
        with pytest.raises(RefusedError, match="device balloon0: free page reporting is on"):
            await vm.reclaimer.reclaim(BOTH, 1, None)
        await until(lambda: vm.refusals.text, STEP_SECONDS, "word that nothing is discarded")
        status = await vm.status()
        assert status.state is VmState.RUNNING
        assert "free page reporting is on" in status.reclaim_refused
        assert not guest.heard("EPOCH")
        assert await guest.run("echo alive") == "alive\n"
