"""Free page reporting: memory must come back by itself, and a way down is waited for to its end."""

from __future__ import annotations

from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest

from hva_host.agent.model import ExecResult
from hva_host.compare import probe as module
from hva_host.compare.method import Method
from hva_host.compare.model import ComparisonReport, MethodRun, Probe
from hva_host.compare.probe import come_to_rest, probe
from hva_host.compare.rows import remarks
from hvaqemu.errors import PeerLost
from hvaqemu.units import MiB
from tests.unit.compare_stand_ins import StandInComparedVm


@pytest.fixture(autouse=True)
def _no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time is what the clock was looked at: a millisecond each."""
    looks = count()
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: next(looks) / 1000))
    monkeypatch.setattr(module, "_LOOK_SECONDS", 0.0)


@pytest.mark.parametrize(
    ("backings", "works", "said"),
    [
        ([300, 300, 290, 180], True, "120.0 MiB came back"),
        ([300, 300], False, "no page of 128.0 MiB that it freed came back in 0.05 s"),
        ([300, 260], False, "only 40.0 MiB of 128.0 MiB"),
    ],
)
async def test_free_pages_must_come_back_by_themselves(
    tmp_path: Path, backings: list[int], works: bool, said: str
) -> None:
    vm = StandInComparedVm(tmp_path)
    vm.backings = [size * MiB for size in backings]
    found = await probe(vm, 512 * MiB, wait=0.05)
    assert found.works is works
    assert said in found.why


async def test_where_a_guest_can_not_use_its_memory_nothing_is_found_out(tmp_path: Path) -> None:
    async def command(_line: str) -> ExecResult:
        return ExecResult(exit_status=None, signal=9, stderr=b"Killed \x1b[31m")

    found = await probe(StandInComparedVm(tmp_path, command), 512 * MiB)
    assert found.works is None
    assert r"can not use 128.0 MiB any more: Killed \x1b[31m" in found.why


async def test_a_guest_that_does_not_answer_says_nothing_of_the_method(tmp_path: Path) -> None:
    async def command(_line: str) -> ExecResult:
        raise PeerLost("the guest agent hung up")

    found = await probe(StandInComparedVm(tmp_path, command), 512 * MiB)
    assert found == Probe(works=None, why="could not be tried: the guest agent hung up")
    run = MethodRun(method=Method.FREE_PAGE_REPORTING, probe=found)
    assert run.broken == ""
    (said,) = remarks(ComparisonReport(source="x", runs=[run]))
    assert said.startswith(
        "free-page-reporting: whether it works on this guest could not be found out: could not be tried"
    )


async def test_a_way_down_is_waited_for_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_REST_SECONDS", 0.1)
    vm = StandInComparedVm(tmp_path)
    # Slow, and less than a MiB at the end.
    vm.backings = [400 * MiB - step * MiB for step in range(200)]
    await come_to_rest(vm)
    assert vm.backings == [201 * MiB]


async def test_a_way_without_end_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_REST_SECONDS", 5.0)
    vm = StandInComparedVm(tmp_path)
    vm.backings = [(1 << 40) - step * MiB for step in range(100_000)]
    await come_to_rest(vm, most=0.1)
    assert len(vm.backings) > 1000
