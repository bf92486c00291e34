"""What pagers cost: private memory and ledger of each of eight, for 1 GiB of RAM, after they have worked."""

from __future__ import annotations

import asyncio
import tempfile
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from benchmarks.figure import Figure, show
from hva_host.agent.epochs import EpochDriver
from hva_host.agent.pager_parent import PagerParent
from hva_host.agent.pager_process import PagerHandle, call
from hva_host.memory.ledger import LEDGER_NAME
from hva_host.pager.coldness import SHARES, WATCHED_SECONDS
from hva_host.pager.membership import Member
from hva_host.pager.process_files import descriptors
from hvaqemu.pages import PAGE_SIZE
from hvaqemu.units import GiB, MiB
from tests.kernel.harness import Vcpu, write_layer

PAGES = GiB // PAGE_SIZE
LAYER_PAGES = 65536
#: Behind them, for the compressed store.
COLD_PAGES = 16384
PAGERS = 8


def main() -> None:
    """Attach each to 1 GiB of RAM, discard a quarter of it and page out more, bring a part back, again, and look."""
    show("pager-memory", figures(asyncio.run(costs())))


def figures(found: list[tuple[int, int]]) -> list[Figure]:
    """From (private bytes, ledger bytes) of each pager."""
    private, ledger = max(found, key=sum)
    return [
        Figure("the largest of eight pagers of 1 GiB guests, private memory + ledger, MiB", (private + ledger) / MiB,
               "<= 12", "", f"private {private / MiB:.1f}, ledger {ledger / MiB:.1f}"),
    ]  # fmt: skip


async def costs() -> list[tuple[int, int]]:
    """Private bytes (the ledger excepted) and ledger bytes of each pager."""
    parent = PagerParent()
    content = np.random.default_rng(1).bytes(LAYER_PAGES * PAGE_SIZE)
    # Each page another, a quarter of each noise: what compresses like a guest's own.
    noise = np.frombuffer(content, np.uint8)[: COLD_PAGES * PAGE_SIZE].reshape(COLD_PAGES, PAGE_SIZE)
    cold = np.where(np.arange(PAGE_SIZE) < PAGE_SIZE // 4, noise, np.uint8(7)).astype(np.uint8).tobytes()
    with ExitStack() as undo:
        folder = Path(undo.enter_context(tempfile.TemporaryDirectory(prefix="hvamem")))
        undo.callback(parent.close)
        layer = write_layer(folder, content)
        pagers = []
        for number in range(PAGERS):
            child = Vcpu(PAGES)
            undo.callback(child.close)
            (folder / str(number)).mkdir()
            driver = EpochDriver(PAGES, 60.0, store=GiB // 4)
            pager = PagerHandle(folder / str(number), parent, driver.on_pager_event)
            await asyncio.to_thread(child.fill, content + cold)
            await pager.start(child.pid, [layer])
            await _work(child, pager, driver)
            pagers.append((pager, child))
        found = [(_private(pager.pid), _ledger(child.pid)) for pager, child in pagers]
        for pager, _ in pagers:
            await pager.close()
        return found


async def _work(child: Vcpu, pager: PagerHandle, driver: EpochDriver) -> None:
    wanted = np.zeros(PAGES, dtype=np.uint8)
    wanted[:LAYER_PAGES] = Member.COPY
    wanted[LAYER_PAGES : LAYER_PAGES + COLD_PAGES] = Member.STABLE
    touch = "m " + " ".join(map(str, range(0, LAYER_PAGES + COLD_PAGES, 5)))
    for _ in range(2):
        for _ in SHARES:
            await driver.transact(pager.link, wanted, 60.0)
            # Only a sample that was watched for so long is followed by more.
            await asyncio.sleep(WATCHED_SECONDS)
        totals = await call(pager, "status")
        if totals["preserved_pages"] < COLD_PAGES // 2:
            raise AssertionError(f"{totals['preserved_pages']} of {COLD_PAGES} pages were paged out")
        assert await asyncio.to_thread(child.say, touch) == "ok"


def _private(pid: int) -> int:
    """What only this process has, in bytes (proc_pid_smaps(5)); the ledger's mapping is counted apart."""
    total, counted = 0, True
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        name, *values = line.split()
        if not name.endswith(":"):
            counted = LEDGER_NAME not in line
        elif counted and name in ("Private_Clean:", "Private_Dirty:"):
            total += int(values[0]) * 1024
    return total


def _ledger(pid: int) -> int:
    fd = next(fd for fd, link in descriptors(pid).items() if LEDGER_NAME in link)
    return Path(f"/proc/{pid}/fd/{fd}").stat().st_blocks * 512
