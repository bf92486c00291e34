"""What the pager of a 1 GiB guest costs: its private memory and the ledger, after it has worked."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.figure import Figure, show
from hva_host.agent.epochs import EpochDriver
from hva_host.agent.pager_process import PagerHandle
from hva_host.memory.index import build_index
from hva_host.memory.ledger import LEDGER_NAME
from hva_host.pager.process_files import descriptors
from hva_host.pager.epoch import Member
from hvaqemu.pages import PAGE_SIZE
from hvaqemu.units import GiB, MiB

PAGES = GiB // PAGE_SIZE
LAYER_PAGES = 65536


def main() -> None:
    """Attach to 1 GiB of RAM, discard a quarter of it, bring a part back, and look."""
    with tempfile.TemporaryDirectory(prefix="hvamem") as folder:
        vcpu = Path(__file__).parents[1] / "tests" / "kernel" / "vcpu.py"
        with subprocess.Popen(
            [sys.executable, str(vcpu), str(PAGES)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        ) as child:
            try:
                show("pager-memory", asyncio.run(_measure(child, Path(folder))))
            finally:
                child.kill()


async def _measure(child: subprocess.Popen[str], folder: Path) -> list[Figure]:
    assert child.stdout is not None
    assert child.stdin is not None
    child.stdout.readline()
    content = np.random.default_rng(1).bytes(LAYER_PAGES * PAGE_SIZE)
    (folder / "golden.raw").write_bytes(content)
    build_index(folder / "golden.raw", folder / "golden.idx")
    links = descriptors(child.pid)
    ram = next(fd for fd, link in links.items() if "memory-backend" in link)
    await asyncio.to_thread(_fill, Path(f"/proc/{child.pid}/fd/{ram}"), content)
    driver = EpochDriver(PAGES)
    handle = PagerHandle(folder, driver.on_pager_event)
    await handle.start(child.pid, [(folder / "golden.raw", folder / "golden.idx")])
    wanted = np.zeros(PAGES, dtype=np.uint8)
    wanted[:LAYER_PAGES] = Member.COPY
    done = await driver.transact(handle.link, wanted, 60.0)
    assert done["discarded"] == LAYER_PAGES, done
    await asyncio.to_thread(_touch, child)
    private = _kib(handle.pid, "Private_Clean", "Private_Dirty") * 1024
    ledger = next(fd for fd, link in links.items() if LEDGER_NAME in link)
    ledger_bytes = Path(f"/proc/{child.pid}/fd/{ledger}").stat().st_blocks * 512
    await handle.close()
    return [
        Figure("pager of a 1 GiB guest, private memory + ledger, MiB", (private + ledger_bytes) / MiB, "<= 32", "",
               f"private {private / MiB:.1f}, ledger {ledger_bytes / MiB:.1f}; the index is shared and file-backed"),
    ]  # fmt: skip


def _fill(ram: Path, content: bytes) -> None:
    with ram.open("r+b") as file:
        file.write(content)


def _touch(child: subprocess.Popen[str]) -> None:
    assert child.stdout is not None
    assert child.stdin is not None
    child.stdin.write("m " + " ".join(map(str, range(0, LAYER_PAGES, 5))) + "\n")
    assert child.stdout.readline() == "ok\n"


def _kib(pid: int, *names: str) -> int:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.split(":")[0] in names)
