"""What it costs to do nothing: host agent, pagers and guest agents of eight idle VMs, for five minutes each way."""

from __future__ import annotations

import asyncio
import os
import tempfile
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

from benchmarks.figure import Figure, show
from hva_host.agent import accounts
from hva_host.agent.background import connect_or_start
from hva_host.agent.client import ControlClient
from hvaqemu.config import VmConfig
from hvaqemu.reclaim_config import ReclaimConfig, ReclaimMode
from hvaqemu.units import MiB

VMS = 8
SECONDS = float(os.environ.get("HVABENCH_IDLE_SECONDS", "300"))
#: After the guests' own start, and after policy has found that there is little to gain.
_SETTLE_SECONDS = {ReclaimMode.MANUAL: 20.0, ReclaimMode.PROACTIVE: 180.0}
#: CPU seconds of the guest agent, by the guest's own clock.
_AGENT_CPU = (
    "for f in /proc/[0-9]*; do tr '\\0' ' ' < $f/cmdline 2>/dev/null | grep -q hva_guest && cat $f/stat; done "
    "| awk '{s += $14 + $15} END {print s / 100}'"
)


@dataclass(frozen=True)
class Spent:
    """CPU seconds a second, of the host agent, of all pagers and their parent, and of the busiest guest agent."""

    agent: float
    pagers: float
    guest: float


def main() -> None:
    """Boot the guests and look."""
    figures = []
    for mode, limit_guest in ((ReclaimMode.MANUAL, ""), (ReclaimMode.PROACTIVE, "<= 0.005")):
        spent = asyncio.run(idle(mode, SECONDS))
        what = f"{VMS} idle VMs, mode {mode}, {SECONDS:.0f} s"
        parts = f"host agent {spent.agent:.4f}, pagers {spent.pagers:.4f}"
        figures.append(
            Figure(f"{what}: host agent and pagers, of a core", spent.agent + spent.pagers, "<= 0.01", "", parts)
        )
        figures.append(Figure(f"{what}: the busiest guest agent, of its vCPU", spent.guest, limit_guest, "", ""))
    show("idle", figures)


async def idle(mode: ReclaimMode, seconds: float) -> Spent:
    """What is spent while guests do nothing."""
    async with AsyncExitStack() as undo:
        folder = Path(undo.enter_context(tempfile.TemporaryDirectory(prefix="hvaidle")))
        client = await connect_or_start(folder)
        undo.push_async_callback(_ended, client)
        names = [f"idle{number}" for number in range(VMS)]
        for name in names:
            reclaim = ReclaimConfig(mode=mode)
            await client.up(VmConfig(name=name, memory=256 * MiB, allow_exec=True, reclaim=reclaim), lambda _line: None)
            undo.push_async_callback(client.down, name)
        agent = int((folder / "agent.lock").read_text())
        pagers = [(await client.status(name)).pager_pid for name in names]
        parents = {int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]) for pid in pagers} - {1}
        await asyncio.sleep(_SETTLE_SECONDS[mode])
        guests = await _guests(client, names)
        before = accounts.cpu_seconds(agent), sum(map(accounts.cpu_seconds, {*pagers, *parents}))
        await asyncio.sleep(seconds)
        after = accounts.cpu_seconds(agent), sum(map(accounts.cpu_seconds, {*pagers, *parents}))
        worst = max(now - then for now, then in zip(await _guests(client, names), guests, strict=True))
        return Spent((after[0] - before[0]) / seconds, (after[1] - before[1]) / seconds, worst / seconds)


async def _guests(client: ControlClient, names: list[str]) -> list[float]:
    return [float((await client.run(name, ["sh", "-c", _AGENT_CPU], 60.0)).stdout) for name in names]


async def _ended(client: ControlClient) -> None:
    await client.quit()
    await client.close()
