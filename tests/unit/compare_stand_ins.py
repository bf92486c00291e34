"""A guest with a balloon that is none: what it uses is decided by the test, what it has by who holds the balloon."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest

from hva_host.agent.condition import Listener
from hva_host.agent.model import Sample
from hva_host.compare import balloon_keeper, method_fleet, probe, runner, watch
from hva_host.compare.method import Method
from hva_host.compare.model import ComparisonReport, Probe
from hva_host.compare.seam import ComparedFleet
from hva_host.scenario.progress import Progress
from hva_host.scenario.seam import PlayedVm
from hvaqemu.config import VmConfig
from hvaqemu.errors import DeadlineExceeded, HvaError
from hvaqemu.scenario_config import Scenario
from hvaqemu.units import MiB
from tests.unit.scenario_stand_ins import Command, StandInVm, a_sample, prints_itself

_UNKNOWN = (1 << 64) - 1


async def compare(
    scenario: Scenario,
    methods: Sequence[Method],
    *,
    source: Path,
    progress: Progress,
    fleet: Callable[[Listener], ComparedFleet] = runner.own_fleet,
) -> ComparisonReport:
    """A comparison played to its end, and what was found."""
    comparison = runner.Comparison(scenario, methods, source=source, progress=progress, fleet=fleet)
    await comparison.play()
    return comparison.report()


class StandInMonitor:
    """QEMU's monitor of such a guest. ``used`` bytes are not available to it, whatever it has."""

    def __init__(self, memory: int = 512 * MiB, used: int = 60 * MiB) -> None:
        self.size = memory
        self.used = used
        self.sizes: list[int] = []
        self.asked: list[tuple[str, Mapping[str, object]]] = []
        self.major_faults = 0
        #: What the guest can give up at most: it gets no smaller.
        self.least = 0
        #: Bytes that it gives up at once, if not all; the rest when it is asked for its word.
        self.pace = memory
        self.wanted = memory
        self.silent = False
        self._began = time.time()
        #: Seconds by which the guest's word is ahead of the real clock, so that tests need not wait for it.
        self.ahead = 0

    async def execute(
        self, command: str, arguments: Mapping[str, object] | None = None, *, timeout: float = 10.0
    ) -> object:
        self.asked.append((command, arguments or {}))
        if command == "balloon":
            size = (arguments or {})["value"]
            assert isinstance(size, int)
            self._ask(size)
        if command != "qom-get":
            return {}
        self.ahead += 1
        self._give()
        figures = {
            "stat-total-memory": self.size,
            "stat-free-memory": max(0, self.size - self.used) // 2,
            "stat-available-memory": max(0, self.size - self.used),
            "stat-major-faults": self.major_faults,
            "stat-swap-in": 0,
            "stat-disk-caches": _UNKNOWN,
        }
        return {"stats": figures, "last-update": 0 if self.silent else int(time.time()) + self.ahead}

    def _ask(self, size: int) -> None:
        self.sizes.append(size)
        self.wanted = size
        self._give()

    def _give(self) -> None:
        self.size = max(self.wanted, self.least, self.size - self.pace)

    async def balloon(self, size: int, timeout: float) -> int:
        self._ask(size)
        if self.size != size:
            raise DeadlineExceeded("balloon: the guest can not")
        return self.size

    async def balloon_actual(self) -> int:
        return self.size


class StandInComparedVm(StandInVm):
    """A VM of a scenario's, with such a monitor."""

    def __init__(self, folder: Path, command: Command = prints_itself) -> None:
        super().__init__(folder, command)
        self.qmp = StandInMonitor()
        #: Backing of each sample to come; the last one stays.
        self.backings = [100 * MiB]

    async def sample(self) -> Sample:
        found = await super().sample()
        backing = self.backings.pop(0) if len(self.backings) > 1 else self.backings[0]
        return found.model_copy(update={"backing_bytes": backing})


class StandInComparedFleet:
    """Launches one of those; ``log`` holds what was asked."""

    def __init__(self, folder: Path, command: Command = prints_itself) -> None:
        self.log: list[str] = []
        self.launch_error: HvaError | None = None
        self.down_error: HvaError | None = None
        self.config: VmConfig | None = None
        self.vm: StandInComparedVm | None = None
        #: Called with the VM right after its launch.
        self.prepare: Callable[[StandInComparedVm], None] = lambda _vm: None
        self._folder = folder
        self._command = command

    async def up(self, config: VmConfig, progress: Callable[[str], None]) -> StandInComparedVm:
        self.log.append(f"up {config.name}")
        self.config = config
        if self.launch_error is not None:
            raise self.launch_error
        self.vm = StandInComparedVm(self._folder, self._command)
        self.prepare(self.vm)
        return self.vm

    async def down(self, name: str) -> str:
        self.log.append(f"down {name}")
        await asyncio.sleep(0)
        if self.down_error is not None:
            raise self.down_error
        return "the guest shut down"

    async def close(self) -> None:
        self.log.append("close")


class Fleets:
    """Makes one for each method, in order."""

    def __init__(self, folder: Path, command: Command = prints_itself) -> None:
        self.made: list[StandInComparedFleet] = []
        #: Called with each one's number and itself, once it is made.
        self.prepare: Callable[[int, StandInComparedFleet], None] = lambda _number, _fleet: None
        self._folder = folder
        self._command = command

    def __call__(self, tell: Listener) -> StandInComparedFleet:
        del tell
        fleet = StandInComparedFleet(self._folder, self._command)
        self.prepare(len(self.made), fleet)
        self.made.append(fleet)
        return fleet

    def vm(self, number: int) -> StandInComparedVm:
        vm = self.made[number].vm
        assert vm is not None
        return vm


def without_waits(patch: pytest.MonkeyPatch) -> None:
    """No image is read, the guest's word comes at once, and free page reporting needs no probe."""

    async def works(_vm: PlayedVm, _memory: int) -> Probe:
        return Probe(works=True, why="it does")

    async def nothing(_scenario: Scenario, _progress: Progress) -> None:
        pass

    patch.setattr(runner, "_warm", nothing)
    patch.setattr(method_fleet, "probe", works)
    patch.setattr(method_fleet, "_WORD_SECONDS", 0.05)
    patch.setattr(probe, "_REST_SECONDS", 0.0)
    patch.setattr(watch, "_LOOK_SECONDS", 0.001)
    patch.setattr(balloon_keeper, "_HOLD_SECONDS", 0.0)


def a_timeline(*points: tuple[float, int]) -> list[Sample]:
    """Samples at seconds, each with MiB of backing."""
    return [a_sample(at).model_copy(update={"backing_bytes": mib * MiB}) for at, mib in points]
