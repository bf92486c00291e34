"""What a scenario needs of a VM and of a fleet; the host agent's own classes have it, and so has a test's stand-in."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from hva_host.agent.model import EpochStats, ExecResult, Measure, ReclaimResult, Sample, VmStatus
from hva_host.agent.ram_frames import RamFrame
from hvaqemu.config import VmConfig
from hvaqemu.reclaim_config import ReclaimConfig, ReclaimState


class PlayedVm(Protocol):
    """A running VM. Everything may raise an HvaError."""

    @property
    def console_log(self) -> Path: ...

    @property
    def failure(self) -> asyncio.Future[str]:
        """Done once the VM can not go on; says why."""

    async def status(self) -> VmStatus: ...

    async def measure(self) -> Measure: ...

    async def sample(self) -> Sample: ...

    async def ram_frame(self) -> RamFrame: ...

    async def reclaim(
        self,
        states: Sequence[ReclaimState],
        *,
        epochs: int | None = None,
        on_epoch: Callable[[EpochStats], None] | None = None,
    ) -> ReclaimResult: ...

    def start_reclaiming(self, states: Sequence[ReclaimState], every: float) -> None: ...

    async def stop_reclaiming(self) -> ReclaimResult: ...

    def set_reclaim(self, reclaim: ReclaimConfig) -> None: ...

    async def restore(self) -> int: ...

    async def execute(
        self, argv: Sequence[str], *, timeout: float, stdin: bytes = b"", limit: int = 1 << 20
    ) -> ExecResult: ...

    async def balloon(self, size: int, timeout: float) -> int: ...


class LaunchingFleet(Protocol):
    """What launches and stops the VM."""

    async def up(self, config: VmConfig, progress: Callable[[str], None]) -> PlayedVm: ...

    async def down(self, name: str) -> str: ...

    async def close(self) -> None: ...
