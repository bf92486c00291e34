"""What a layer gives for nothing: a guest whose discarded page cache it has freed itself writes a large file.

Without more, each page's first touch loads the old content from its layer, only to be overwritten. After an epoch in
which the guest confirmed those pages free, they come back as zeros.
"""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path

from benchmarks.figure import Figure, show
from benchmarks.guest import READ, run
from hva_host.agent.fleet import Fleet
from hva_host.agent.vm import Vm
from hvaqemu.config import VmConfig
from hvaqemu.reclaim_config import DEFAULT_STATES, ReclaimState
from hvaqemu.units import MiB

_MIB = 256
_WRITE = f"dd if=/dev/zero of=/root/large bs=64k count={_MIB * 16}"
_ROUNDS = 3


def main() -> None:
    """Boot a guest and write, with and without such an epoch before."""
    asyncio.run(_main())


async def _main() -> None:
    with tempfile.TemporaryDirectory(prefix="hvabench") as runtime:
        fleet = Fleet(Path(runtime), embedded=True)
        try:
            config = VmConfig(name="bench", memory=512 * MiB, cpus=2, allow_exec=True)
            vm = await fleet.up(config, lambda _line: None)
            rounds = [(await _loads(vm, turn=False), await _loads(vm, turn=True)) for _ in range(_ROUNDS)]
        finally:
            await fleet.close()
    loaded, spared = (sorted(each)[_ROUNDS // 2] for each in zip(*rounds, strict=True))
    show(
        "false-loads",
        [
            Figure(f"layer pages loaded for nothing while {_MIB} MiB are written, with the turning / without",
                   spared / loaded, "<= 0.2", "0", f"{spared} / {loaded} pages; all rounds: {rounds}"),
        ],
    )  # fmt: skip


async def _loads(vm: Vm, *, turn: bool) -> int:
    """Pages loaded from layers while the guest writes into memory it has freed; with an epoch before, or without."""
    await run(vm, READ)
    await vm.reclaim(DEFAULT_STATES)
    await run(vm, "sync; echo 3 >/proc/sys/vm/drop_caches")
    if turn:
        await vm.reclaim((ReclaimState.UNUSED,), epochs=1)
    before = (await vm.measure()).layer_pages_loaded
    await run(vm, _WRITE)
    loaded = (await vm.measure()).layer_pages_loaded - before
    await run(vm, "rm /root/large; sync")
    return loaded
