"""A guest whose disks are frozen and merged, under a host agent of its own that may die at any point that is armed."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from hva_host.agent.model import FrozenDisk, VmStatus
from hvaqemu.errors import HvaError, LaunchError, PeerLost
from hvaqemu.faultpoints import VARIABLE
from hvaqemu.reclaim_config import DEFAULT_STATES
from tests.vm.host import Host
from tests.vm.programs import bundle, start_command

#: On the root disk.
FOLDER = "/var/tmp/frozen"
#: Has a shell of the guest know its disks by their names.
DISKS = "cd /sys/block; for d in vd*; do read -r name <$d/serial; eval $name=$d; done"


class Frozen:
    """The guest, and what tests do with it.

    :param points: fault points that :meth:`arm` can arm, by what happens there.
    """

    def __init__(self, host: Host, name: str, points: Sequence[str]) -> None:
        self.host = host
        self.name = name
        host.folder.mkdir(exist_ok=True)
        actions = [point if ":" in point else f"{point}:kill" for point in points]
        host.environment[VARIABLE] = ",".join(f"{each}:{host.folder / each.partition(':')[0]}" for each in actions)
        self.file = host.folder / "vm.yaml"

    def write_config(self, *lines: str) -> None:
        """The VM's file."""
        common = f"name: {self.name}\nmemory: 256M\nallow_exec: true\nboot_timeout: 240s\nkeep_disks: true\n"
        self.file.write_text(common + "".join(f"{line}\n" for line in lines))

    async def sh(self, script: str, stdin: bytes = b"", argv: tuple[str, ...] = ()) -> str:
        """What a script prints, asked again when the host agent dies while it runs."""
        async with asyncio.timeout(240):
            while True:
                with suppress(PeerLost, LaunchError):
                    async with self.host.client() as client:
                        done = await client.run(self.name, list(argv) or ["sh", "-c", script], 200, stdin)
                    assert done.ok, done
                    return done.stdout.decode()
                await asyncio.sleep(0.1)

    async def rewriter(self, *words: str) -> str:
        return await self.sh("", bundle(), tuple(start_command("rewriter", *words)))

    async def freeze(self, disk: str | None = None) -> list[FrozenDisk]:
        async with self.host.client() as client:
            return await client.freeze(self.name, disk, lambda _event, _data: None)

    async def merge(self) -> list[str]:
        async with self.host.client() as client:
            return await client.merge(self.name, None, lambda _event, _data: None)

    async def reclaim(self, epochs: int | None = None) -> int:
        """Bytes of backing afterwards."""
        async with self.host.client() as client:
            return (await client.reclaim(self.name, DEFAULT_STATES, epochs, lambda _stats: None)).backing_after_bytes

    async def restore(self) -> int:
        async with self.host.client() as client:
            return await client.restore(self.name)

    async def status(self) -> VmStatus:
        async with self.host.client() as client:
            return await client.status(self.name)

    def arm(self, point: str) -> None:
        (self.host.folder / point).touch()

    def armed(self, point: str) -> bool:
        return (self.host.folder / point).exists()

    def disks(self) -> Path:
        return self.host.state / "vms" / self.name

    def record(self) -> dict[str, Any]:
        return dict(json.loads((self.host.runtime / "vms" / self.name / "vm.json").read_text()))

    async def settled(self, seconds: float = 60.0) -> VmStatus:
        """Once every frozen file is a layer and nothing is under way, which a new host agent sees to by itself."""
        async with asyncio.timeout(seconds):
            while True:
                with suppress(HvaError):
                    status, record = await self.status(), self.record()
                    begun = record["merging"] or any(chain["pending"] for chain in record["chains"])
                    if not begun and all(disk.indexed == disk.frozen for disk in status.disks):
                        return status
                await asyncio.sleep(0.1)


@asynccontextmanager
async def running(found: Frozen) -> AsyncIterator[Frozen]:
    """The guest while it runs; nothing may be left of it afterwards."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in found.host.environment.items():
            patch.setenv(name, value)
        await found.host.command("up", found.file)
        yield found
        await found.host.command("down", found.name, "--delete-disks")
        await found.host.all_gone()
