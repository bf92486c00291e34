"""A pager that dies at named points and is replaced by the host agent's keeper, and a guest that checks its memory."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from hva_host.agent.epochs import EpochDriver
from hva_host.agent.guest_link import GuestLink
from hva_host.agent.pager_keeper import keep_pager
from hva_host.agent.pager_parent import PagerParent
from hva_host.agent.pager_process import PagerHandle, call
from hva_host.memory.store_file import STORE_AT_NAME, STORE_NAME, store_identity
from hva_host.pager.membership import Member
from hva_host.pager.process_files import descriptors
from hvaqemu.errors import DeadlineExceeded, PeerLost, RefusedError
from hvaqemu.faultpoints import VARIABLE
from hvaqemu.pages import Run
from hvaqemu.qemu.process import QemuProcess
from tests.kernel.harness import PAGE, Vcpu, block, crc, write_layer

COPIES, FREE, PRECIOUS, COLD = range(64), range(64, 128), range(128, 192), range(192, 256)
#: Copies that a guest frees.
FREED = range(32, 64)
PAGES = 256
#: Bounds what only a failure makes long.
_SECONDS = 60.0


class Machine:
    """A child in QEMU's place, its pager, and who replaces that when it dies.

    :param points: fault points, each armed by :meth:`arm`.
    :param on_disk: its store is a file.
    """

    def __init__(self, folder: Path, points: dict[str, str], *, on_disk: bool = False) -> None:
        self.folder = folder
        self.on_disk = on_disk
        self.points = points
        self.restarts = 0
        self._back = asyncio.Event()
        self._told = asyncio.Event()
        self.failures: list[Exception] = []
        self.layers = (write_layer(folder, b"".join(map(block, COPIES))),)
        self.child = Vcpu(PAGES, folder if on_disk else None)
        self.expected: dict[int, set[int]] = {}
        self._lock = asyncio.Lock()
        self.driver = EpochDriver(PAGES, 5.0, store=PAGES * PAGE)
        self.parent = PagerParent()
        self.pager = PagerHandle(folder, self.parent, self._on_event)
        self.process: QemuProcess | None = None
        self._keeper: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Fill RAM, attach the pager, keep it."""
        content = [cold(pfn) if pfn in COLD else block(pfn) for pfn in range(PAGES)]
        self.child.fill(b"".join(content))
        for pfn, data in enumerate(content):
            self.expected[pfn] = {crc(data)}
        faults = ",".join(f"{name}:{action}:{self.folder / name}" for name, action in self.points.items())
        before = os.environ.get(VARIABLE)
        os.environ[VARIABLE] = faults
        try:
            await self.parent.prepare()
        finally:
            os.environ.pop(VARIABLE) if before is None else os.environ.update({VARIABLE: before})
        stat = Path(f"/proc/{self.child.pid}/stat").read_text().rpartition(")")[2].split()
        self.process = QemuProcess.adopt(self.child.pid, int(stat[19]), self.folder / "log")
        await self.pager.start(self.child.pid, self.layers)
        self._keeper = asyncio.create_task(keep_pager(self.pager, self.process, lambda: self.layers, self))

    async def keep_no_more(self) -> None:
        """Nobody replaces the pager any more, as where the host agent is dead."""
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.wait({self._keeper})

    async def close(self) -> None:
        await self.keep_no_more()
        self.child.close()
        await self.pager.wait_ended(10)
        await self.pager.close()
        self.parent.close()
        if self.process is not None:
            self.process.close()

    def arm(self, name: str) -> None:
        """Have the next process that comes to the point act on it."""
        (self.folder / name).touch()

    def armed(self, name: str) -> bool:
        """Has nobody come to the point since?"""
        return (self.folder / name).exists()

    def _on_event(self, name: str, data: dict[str, Any]) -> None:
        self._told.set()
        self.driver.on_pager_event(name, data)

    # What becomes of the pager

    def pager_lost(self) -> None:
        pass

    def pager_failed(self, error: Exception) -> None:
        self.failures.append(error)

    def pager_back(self, seconds: float) -> None:
        self.restarts += 1
        self._back.set()

    async def restarted(self, times: int) -> None:
        """Wait for so many restarts."""
        async with asyncio.timeout(_SECONDS):
            while self.restarts < times:
                self._back.clear()
                await self._back.wait()

    def kill_pager(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pager.pid, signal.SIGKILL)

    async def replace_pager(self) -> None:
        """Kill the pager and wait for the next."""
        before = self.restarts
        self.kill_pager()
        await self.restarted(before + 1)

    async def held(self) -> list[dict[str, Any]]:
        """What the pager holds, once it holds something."""
        async with asyncio.timeout(_SECONDS):
            while True:
                self._told.clear()
                if found := (await call(self.pager, "status"))["held"]:
                    return cast(list[dict[str, Any]], found)
                await self._told.wait()

    def open_store(self) -> int:
        """The store, as QEMU has it."""
        folder = Path(f"/proc/{self.child.pid}/fd")
        links = descriptors(self.child.pid)
        if self.on_disk:
            where = next(fd for fd, link in links.items() if STORE_AT_NAME in link)
            with (folder / str(where)).open("rb") as file:
                identity = store_identity(file.fileno())
            found = {fd: (folder / str(fd)).stat() for fd in links}
            number = next(fd for fd, status in found.items() if (status.st_dev, status.st_ino) == identity)
        else:
            number = next(fd for fd, link in links.items() if STORE_NAME in link)
        return os.open(folder / str(number), os.O_RDWR)

    # What the guest does

    async def open(self, path: Path) -> None:
        """Have the child open a file, as QEMU has its disks open."""
        await self._vcpu(f"o {path}")

    async def plug(self, pages: int) -> None:
        """Have the child get further RAM, as a hot-plugged memory device would."""
        await self._vcpu(f"p {pages}")

    async def read(self, pfn: int) -> int:
        """CRC-32 of a page as the vCPU reads it, however long that takes."""
        return int((await self._vcpu(f"r {pfn}")).split()[1])

    async def write(self, pfn: int, text: str) -> None:
        """Write at the start of a page that is neither discarded nor free."""
        data = bytearray(block(pfn))
        data[: len(text)] = text.encode()
        await self._vcpu(f"w {pfn} {text}")
        self.expected[pfn] = {crc(data)}

    async def _vcpu(self, line: str) -> str:
        async with self._lock:
            return await asyncio.wait_for(asyncio.to_thread(self.child.say, line), _SECONDS)

    async def epoch(self, *, stable: bool = False) -> dict[str, Any] | None:
        """One epoch over copies and free pages, with a write while they are protected; None if its pager died.

        :param stable: page out others too.
        """
        wanted = np.zeros(PAGES, dtype=np.uint8)
        wanted[COPIES.start : COPIES.stop] = Member.COPY
        wanted[FREE.start : FREE.stop] = Member.UNUSED
        if stable:
            wanted[PRECIOUS.start : COLD.stop] = Member.STABLE
        for pfn in FREE:
            # A free page has its old bytes until it is discarded.
            self.expected[pfn] |= {crc(bytes(PAGE))}
        try:
            return await self.driver.transact(self.pager.link, wanted, 5.0, cast(GuestLink, _Guest(self)))
        except (PeerLost, DeadlineExceeded, RefusedError):
            return None

    async def turn(self, freed: range = FREED) -> dict[str, Any] | None:
        """One epoch after which what the guest has freed of its discarded pages is zeros; None if its pager died."""
        wanted = np.zeros(PAGES, dtype=np.uint8)
        wanted[COPIES.start : COPIES.stop] = wanted[COLD.start : COLD.stop] = Member.UNUSED
        for pfn in freed:
            # As above; from here on either is right.
            self.expected[pfn] |= {crc(bytes(PAGE))}
        try:
            return await self.driver.transact(self.pager.link, wanted, 5.0, cast(GuestLink, _Freed(freed)))
        except (PeerLost, DeadlineExceeded, RefusedError):
            return None

    async def check(self) -> None:
        """Every page has the bytes it must have, in an order no read-ahead expects."""
        pfns = list(range(PAGES))
        random.Random(5).shuffle(pfns)
        for pfn in pfns:
            found = await self.read(pfn)
            assert found in self.expected[pfn], f"page {pfn} is wrong"
            self.expected[pfn] = {found}


def cold(pfn: int) -> bytes:
    """A page that compresses; two neighbours have the same."""
    return block(pfn & ~1)[:900] + b"cold" * 799


class _Guest:
    """A guest agent's word: all FREE pages are free. The guest writes to a protected page before it says so."""

    hello = SimpleNamespace(checks_free_pages=False)

    def __init__(self, machine: Machine) -> None:
        self._machine = machine

    async def confirm(self, _epoch: bytes, number: int, part: Run, _timeout: float) -> NDArray[np.bool_]:
        machine = self._machine
        if number == 1:
            # In use again, and written: whatever the guest said of it before, it must not be discarded.
            await machine.write(FREE.start, "used-again")
            await machine.write(PRECIOUS.start, "precious")
        free = np.zeros(PAGES, dtype=np.bool_)
        free[FREE.start : FREE.stop] = True
        return free[part.start : part.stop]


class _Freed:
    """A guest agent's word: these pages are free."""

    hello = SimpleNamespace(checks_free_pages=False)

    def __init__(self, freed: range) -> None:
        self._freed = freed

    async def confirm(self, _epoch: bytes, _number: int, part: Run, _timeout: float) -> NDArray[np.bool_]:
        free = np.zeros(PAGES, dtype=np.bool_)
        free[self._freed.start : self._freed.stop] = True
        return free[part.start : part.stop]
