"""What a comparison needs of a VM and of a fleet beyond what a scenario does; the host agent's own classes have it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from hva_host.compare.balloon_keeper import Balloon
from hva_host.scenario.seam import PlayedVm
from hvaqemu.config import VmConfig


class ComparedVm(PlayedVm, Protocol):
    """A running VM. Everything may raise an HvaError."""

    @property
    def qmp(self) -> Balloon:
        """QEMU's monitor."""


class ComparedFleet(Protocol):
    """What launches and stops the VM."""

    async def up(self, config: VmConfig, progress: Callable[[str], None]) -> ComparedVm: ...

    async def down(self, name: str) -> str: ...

    async def close(self) -> None: ...
