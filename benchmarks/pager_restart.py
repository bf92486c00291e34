"""How long a guest stands still when its pager is killed: from SIGKILL to the first answered access, by its own clock.

A program in the guest touches pages that were discarded, every few milliseconds, and tells of every gap. So what is
measured includes noticing the death, a new pager, its attaching, and waking who waits.
"""

from __future__ import annotations

import asyncio
import os
import signal
import statistics
import tempfile
import time
from pathlib import Path

from benchmarks.figure import Figure, show
from hva_host.agent.fleet import Fleet
from hva_host.agent.vm import Vm
from hvaqemu.config import ExtraDisk, VmConfig
from hvaqemu.reclaim_config import DEFAULT_STATES
from hvaqemu.units import MiB
from tests.vm.board import SERIAL, Board, GapLog
from tests.vm.harness import until
from tests.vm.programs import bundle, start_command

KILLS = 20
#: Touches before a kill, so that the program is at it.
_TOUCHES = 20
_WAIT_SECONDS = 60.0
_LOOK_SECONDS = 0.02


def main() -> None:
    """Boot a guest and kill its pager again and again."""
    asyncio.run(_main())


async def _main() -> None:
    with tempfile.TemporaryDirectory(prefix="hvabench") as folder:
        board = Board(Path(folder) / "board.raw")
        runtime = Path(folder) / "r"
        runtime.mkdir(mode=0o700)
        fleet = Fleet(runtime, embedded=True)
        try:
            disk = ExtraDisk(path=board.disk)
            config = VmConfig(name="bench", memory=512 * MiB, cpus=2, allow_exec=True, extra_disks=(disk,))
            vm = await fleet.up(config, lambda _line: None)
            assert (await vm.execute(start_command("probe", SERIAL), timeout=_WAIT_SECONDS, stdin=bundle())).ok
            # Only then it has read what it will touch.
            await _touched(board, 0)
            pauses = [await _pause(vm, board) for _ in range(KILLS)]
            restarts, longest = vm.record.pager_restarts, vm.record.pager_pause_s
            assert restarts == KILLS, restarts
            assert not board.answer()["problems"], board.answer()
        finally:
            await fleet.close()
    spread = statistics.quantiles(pauses, n=10)
    show(
        "pager-restart",
        [
            Figure("pager killed: the guest stands still for, longest, s", max(pauses), "<= 1", "",
                   f"{KILLS} kills: shortest {min(pauses):.3f}, 10 % {spread[0]:.3f}, "
                   f"median {statistics.median(pauses):.3f}, 90 % {spread[-1]:.3f}; "
                   f"until a new pager serves, by the host agent's clock: {longest:.3f}"),
        ],
    )  # fmt: skip


async def _pause(vm: Vm, board: Board) -> float:
    """Seconds from the death of the pager to the next access that the guest could make to what was discarded."""
    await board.do("rest")
    await vm.reclaim(DEFAULT_STATES)
    touches = board.touches
    board.order("go")
    await _touched(board, touches)
    gaps = GapLog()
    for _ in range(3):
        # Their clocks are set against each other before the death, which keeps the guest from telling the time.
        gaps.look(board.answer())
        # Nothing on the host tells that QEMU has written to the disk.
        await asyncio.sleep(_LOOK_SECONDS)
    restarts, killed = vm.record.pager_restarts, time.monotonic()
    os.kill(vm.pager.pid, signal.SIGKILL)
    await until(lambda: vm.record.pager_restarts > restarts, _WAIT_SECONDS, "a new pager")
    touches = board.touches
    await _touched(board, touches)
    gaps.look(board.answer())
    # The first it could not make; those after it wait for answers, but no longer for a pager.
    first = next(gap for gap in gaps.gaps if gap.began + gap.seconds > killed)
    return first.began + first.seconds - killed


async def _touched(board: Board, before: int) -> None:
    more = before + _TOUCHES
    await until(lambda: board.touches > more, _WAIT_SECONDS, "the program in the guest")
