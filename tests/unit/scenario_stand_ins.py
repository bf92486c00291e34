"""A VM and a fleet that are none, behind the seam of :mod:`hva_host.scenario.seam`; and a progress that remembers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import numpy as np

from hva_host.agent.model import (
    EpochStats,
    ExecResult,
    Measure,
    PhaseSeconds,
    ReclaimResult,
    Sample,
    StallStats,
    VmState,
    VmStatus,
)
from hva_host.agent.ram_frames import RamFrame, packed
from hva_host.report.model import StepRecord
from hvaqemu.config import VmConfig
from hvaqemu.errors import RefusedError
from hvaqemu.reclaim_config import ReclaimConfig, ReclaimState
from hvaqemu.units import MiB


def a_measure(backing: int = 100 * MiB, uptime: float = 1.0) -> Measure:
    return Measure(
        uptime_s=uptime,
        backing_bytes=backing,
        resident_pages=backing >> 12,
        zero_pages=256,
        layer_pages=512,
        preserved_pages=0,
        refaults=1234,
        refault_pages=2560,
        qemu_rss_bytes=52 * MiB,
        pager_pss_bytes=20 * MiB,
        agent_rss_bytes=60 * MiB,
        store_bytes=0,
        layer_cached_bytes=400 * MiB,
        guest_free_bytes=30 * MiB,
    )


def an_epoch(number: int = 1, discarded: int = 100) -> EpochStats:
    return EpochStats(
        number=number,
        candidates=discarded + 6,
        proven=discarded,
        touched=1,
        unmatched=2,
        unconfirmed=3,
        discarded=discarded,
        discarded_zero=discarded // 2,
        discarded_layer=discarded - discarded // 2,
        discarded_store=0,
        unpreserved=0,
        later=0,
        resting=0,
        resident_before=1000,
        seconds=PhaseSeconds(total=0.1),
        protected_s=0.08,
    )


def a_sample(at: float = 0.0) -> Sample:
    return Sample(
        at_s=at,
        backing_bytes=100 * MiB,
        zero_pages=256,
        layer_pages=512,
        preserved_pages=0,
        store_bytes=0,
        refault_pages=int(at * 100),
        states={"stable": 10_000, "unused": 100_000, "volatile": 20_000, "potential": 72},
    )


def a_frame(at: float = 0.0, cells: int = 64) -> RamFrame:
    """Of each cell a fifth is in each residence and a fifth was never touched; a quarter is in each state."""
    fifths, quarters = np.full((4, cells), 51, dtype=np.uint8), np.full((3, cells), 63, dtype=np.uint8)
    return RamFrame(at_s=at, cells=cells, residence=packed(fifths), states=packed(quarters))


Command = Callable[[str], Awaitable[ExecResult]]


async def prints_itself(command: str) -> ExecResult:
    return ExecResult(exit_status=0, stdout=command.encode())


class StandInVm:
    """Answers at once. ``log`` holds what was asked, ``command`` decides what a guest's command does."""

    def __init__(self, folder: Path, command: Command = prints_itself) -> None:
        self.log: list[str] = []
        self.command = command
        self.failure: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.console_log = folder / "console.log"
        self.console_log.write_bytes(b"booted\n\x1b[31mOops\n")
        self.backing = [100 * MiB]
        self.errors: dict[str, Exception] = {}
        self.reclaiming = False
        self._began = time.monotonic()

    def _asked(self, what: str) -> None:
        self.log.append(what)
        if error := self.errors.get(what.split()[0]):
            raise error

    async def status(self) -> VmStatus:
        return VmStatus(
            name="vm",
            state=VmState.RUNNING,
            pid=1,
            pager_pid=2,
            guest_connected=True,
            guest_kernel="6.1.0 \x1b[31m",
            memory_bytes=512 * MiB,
            stalls=StallStats(count=7, sum_s=0.1, median_s=0.00002, p99_s=0.001, longest_s=0.01),
        )

    async def measure(self) -> Measure:
        self._asked("measure")
        backing = self.backing.pop(0) if len(self.backing) > 1 else self.backing[0]
        return a_measure(backing)

    async def sample(self) -> Sample:
        return a_sample(10.0 + time.monotonic() - self._began)

    async def ram_frame(self) -> RamFrame:
        self._asked("frame")
        return a_frame(10.0 + time.monotonic() - self._began)

    async def reclaim(
        self,
        states: Sequence[ReclaimState],
        *,
        epochs: int | None = None,
        on_epoch: Callable[[EpochStats], None] | None = None,
    ) -> ReclaimResult:
        self._asked(f"reclaim {','.join(states)} {epochs}")
        done = [an_epoch(number) for number in range(1, (epochs or 2) + 1)]
        for epoch in done:
            if on_epoch is not None:
                on_epoch(epoch)
        return self._result(done)

    def start_reclaiming(self, states: Sequence[ReclaimState], every: float) -> None:
        self._asked(f"start {','.join(states)} {every:g}")
        self.reclaiming = True

    async def stop_reclaiming(self) -> ReclaimResult:
        self._asked("stop")
        if not self.reclaiming:
            raise RefusedError("no reclaim runs")
        self.reclaiming = False
        return self._result([an_epoch(9)])

    def _result(self, epochs: list[EpochStats]) -> ReclaimResult:
        return ReclaimResult(
            epochs=epochs,
            discarded=sum(epoch.discarded for epoch in epochs),
            backing_before_bytes=100 * MiB,
            backing_after_bytes=50 * MiB,
            store_before_bytes=0,
            store_after_bytes=0,
            seconds=0.1,
        )

    def set_reclaim(self, reclaim: ReclaimConfig) -> None:
        self._asked(f"set {reclaim.mode}")

    async def restore(self) -> int:
        self._asked("restore")
        return 1234

    async def execute(
        self, argv: Sequence[str], *, timeout: float, stdin: bytes = b"", limit: int = 1 << 20
    ) -> ExecResult:
        assert list(argv[:2]) == ["/bin/sh", "-c"]
        self._asked(f"guest {argv[2]}")
        return await self.command(argv[2])

    async def balloon(self, size: int, timeout: float) -> int:
        self._asked(f"balloon {size // MiB}")
        return size


class StandInFleet:
    """Has one VM at most; ``log`` holds what was asked of it and, at the end, of its VM."""

    def __init__(self, folder: Path, command: Command = prints_itself) -> None:
        self.log: list[str] = []
        #: Set once the VM's shut-down has begun.
        self.ending = asyncio.Event()
        self.vm: StandInVm | None = None
        self.launch_error: Exception | None = None
        #: Called with the VM right after its launch.
        self.prepare: Callable[[StandInVm], None] = lambda _vm: None
        self._folder = folder
        self._command = command

    async def up(self, config: VmConfig, progress: Callable[[str], None]) -> StandInVm:
        self.log.append(f"up {config.name}")
        progress("booting")
        await asyncio.sleep(0)
        if self.launch_error is not None:
            raise self.launch_error
        self.vm = StandInVm(self._folder, self._command)
        self.prepare(self.vm)
        return self.vm

    async def down(self, name: str) -> str:
        # Takes a few turns of the loop, as the real one: a second cancellation must not cut it short.
        self.log.append(f"down {name} begins")
        self.ending.set()
        for _ in range(5):
            await asyncio.sleep(0.01)
        self.log.append(f"down {name}")
        return "the guest shut down"

    async def close(self) -> None:
        self.log.append("close")


class Remembering:
    """A progress that keeps what it was told."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.ended: list[StepRecord] = []

    def say(self, line: str) -> None:
        self.said.append(line)

    def step_begins(self, number: int, total: int, title: str) -> None:
        self.said.append(f"{number}/{total} {title}")

    def step_goes_on(self, figures: str) -> None:
        self.said.append(figures)

    def step_ended(self, step: StepRecord, total: int) -> None:
        self.ended.append(step)
