"""A fleet without QEMU, and a control socket on it: the seam that the control socket's tests stand on."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

from hva_host.agent.control import CONTROL_SOCKET, ControlServer
from hva_host.agent.control_commands import CommandTable
from hva_host.agent.events import what_is_wrong
from hva_host.agent.history import VmReport
from hva_host.agent.model import (
    EpochStats,
    ExecResult,
    FrozenDisk,
    HeldPages,
    Measure,
    PhaseSeconds,
    ReclaimResult,
    VmState,
    VmStatus,
)
from hvaqemu.config import VmConfig
from hvaqemu.errors import ConfigError, GuestError, RefusedError
from hvaqemu.reclaim_config import ReclaimConfig, ReclaimState
from tests.unit.scenario_stand_ins import a_frame, a_sample

MEASURE = Measure(
    uptime_s=12.5,
    backing_bytes=96 << 20,
    resident_pages=24576,
    zero_pages=256,
    layer_pages=512,
    preserved_pages=0,
    refaults=1234,
    refault_pages=5678,
    qemu_rss_bytes=50 << 20,
    pager_pss_bytes=30 << 20,
    agent_rss_bytes=40 << 20,
    store_bytes=0,
    layer_cached_bytes=100 << 20,
    guest_free_bytes=-1,
)


def epoch(number: int, discarded: int) -> EpochStats:
    return EpochStats(
        number=number,
        candidates=discarded + 3,
        proven=discarded,
        touched=1,
        unmatched=2,
        unconfirmed=0,
        discarded=discarded,
        discarded_zero=0,
        discarded_layer=discarded,
        discarded_store=0,
        unpreserved=0,
        later=0,
        resting=0,
        resident_before=10_000,
        seconds=PhaseSeconds(total=0.25),
        protected_s=0.2,
    )


class StandInVm:
    """A VM that remembers what it was asked."""

    def __init__(self, config: VmConfig, emit: Callable[[str, dict[str, Any]], None], console: Path) -> None:
        self.name = config.name
        self.config = config
        self.console_log = console
        self.state = VmState.RUNNING
        self.reason = ""
        self.refused = ""
        self.kernel = "6.1.0-s390x"
        self.held: list[HeldPages] = []
        self.asked: list[object] = []
        #: Since the last freeze.
        self.nothing_written = False
        self.answer = ExecResult(exit_status=0, stdout=b"out\n", stderr=b"err\n")
        #: A restore waits for this; and says whether it was cancelled meanwhile.
        self.go_on = asyncio.Event()
        self.restoring = asyncio.Event()
        self.cancelled = asyncio.Event()
        self._emit = emit

    async def status(self) -> VmStatus:
        return VmStatus(
            name=self.name,
            state=self.state,
            reason=self.reason,
            reclaim_refused=self.refused,
            pid=4321,
            pager_pid=4322,
            guest_connected=True,
            guest_kernel=self.kernel,
            memory_bytes=self.config.memory,
            measure=MEASURE,
            epochs=[epoch(1, 100)],
            held=self.held,
        )

    async def measure(self) -> Measure:
        return MEASURE

    async def report(self) -> VmReport:
        return VmReport(
            status=await self.status(),
            timeline=[a_sample(1.0), a_sample(12.5)],
            ram=[a_frame(1.0), a_frame(12.5)],
            configuration=self.config.model_dump(mode="json"),
            versions={"guest kernel": self.kernel},
        )

    async def reclaim(
        self, states: Sequence[ReclaimState], *, epochs: int | None = None, on_epoch: Any = None
    ) -> ReclaimResult:
        self.asked.append((tuple(states), epochs))
        done = [epoch(number, 100 // number) for number in range(1, (epochs or 2) + 1)]
        for stats in done:
            self._emit("EPOCH", {"name": self.name, "stats": stats.model_dump()})
        return ReclaimResult(
            epochs=done,
            discarded=sum(stats.discarded for stats in done),
            backing_before_bytes=200 << 20,
            backing_after_bytes=100 << 20,
            store_before_bytes=0,
            store_after_bytes=0,
            seconds=1.5,
        )

    async def freeze(self, disk: str | None) -> list[FrozenDisk]:
        self.asked.append(("freeze", disk))
        if self.nothing_written:
            return [FrozenDisk(disk="root", layer=None, bytes=0, seconds=0.1, index_seconds=0.0)]
        self._emit("LAYER_INDEXING", {"name": self.name, "layer": "/s/root.qcow2", "done": 1 << 20, "size": 4 << 20})
        return [FrozenDisk(disk="root", layer="/s/root.qcow2", bytes=4 << 20, seconds=0.1, index_seconds=0.2)]

    async def merge(self, disk: str | None) -> list[str]:
        self.asked.append(("merge", disk))
        self._emit("MERGING", {"name": self.name, "disk": "root", "done": 1 << 20, "size": 4 << 20})
        return ["/s/root-1.qcow2"]

    async def restore(self) -> int:
        self.restoring.set()
        try:
            await self.go_on.wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        return 768

    async def resume(self) -> int:
        return sum(len(held.pages) for held in self.held)

    async def execute(
        self, argv: Sequence[str], *, timeout: float, stdin: bytes = b"", limit: int = 1 << 20
    ) -> ExecResult:
        self.asked.append((tuple(argv), timeout, stdin))
        if not self.config.allow_exec:
            raise RefusedError(f"VM {self.name}: commands in the guest are off", "set allow_exec: true in its file")
        if argv[0] == "missing":
            raise GuestError("missing: no such program\nin the guest")
        if argv[0] == "bug":
            raise ZeroDivisionError("of ours")
        return self.answer

    async def balloon(self, size: int, timeout: float) -> int:
        self.asked.append((size, timeout))
        return size

    async def monitor(self, command: str, arguments: Mapping[str, object], timeout: float) -> object:
        self.asked.append((command, dict(arguments), timeout))
        if command == "migrate-incoming":
            raise RefusedError("QMP migrate-incoming: it would not be safe", "do something else")
        return [{"said": "na\u00efve \x9b31m"}]


class StandInFleet:
    """VMs by name."""

    def __init__(self, folder: Path, emit: Callable[[str, dict[str, Any]], None]) -> None:
        self.machines: dict[str, StandInVm] = {}
        self.reloads = 0
        self.downing = asyncio.Event()
        self.go_down = asyncio.Event()
        self.go_down.set()
        self._folder = folder
        self._emit = emit

    def add(self, name: str, **more: Any) -> StandInVm:
        config = VmConfig(name=name, memory=256 << 20, **more)
        vm = StandInVm(config, self._emit, self._folder / f"{name}.console")
        self.machines[name] = vm
        return vm

    async def up(self, config: VmConfig, progress: Callable[[str], None]) -> StandInVm:
        if config.name in self.machines:
            raise ConfigError(f"VM {config.name}: the name is taken", "choose another")
        progress("starting QEMU")
        vm = StandInVm(config, self._emit, self._folder / f"{config.name}.console")
        self.machines[config.name] = vm
        return vm

    async def down(self, name: str, keep_disks: bool | None = None) -> str:
        self.get(name)
        self.downing.set()
        await self.go_down.wait()
        del self.machines[name]
        return "the guest shut down"

    def get(self, name: str) -> StandInVm:
        if name not in self.machines:
            raise ConfigError(f"VM {name}: no such VM", "known: none is running")
        return self.machines[name]

    def set_reclaim(self, name: str, reclaim: ReclaimConfig) -> None:
        vm = self.get(name)
        vm.config = vm.config.model_copy(update={"reclaim": reclaim})

    def reload(self) -> None:
        self.reloads += 1

    def vms(self) -> list[StandInVm]:
        return list(self.machines.values())


class Served:
    """A control socket that serves."""

    def __init__(self, path: Path, server: ControlServer, fleet: StandInFleet, stop: asyncio.Event) -> None:
        self.path = path
        self.server = server
        self.fleet = fleet
        #: Set by ``quit``.
        self.stop = stop


@contextmanager
def short_folder() -> Any:
    """A folder whose path leaves room for the names of sockets, which pytest's own need not."""
    folder = Path(tempfile.mkdtemp(prefix="hva-", dir="/tmp"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


@asynccontextmanager
async def served(folder: Path) -> AsyncIterator[Served]:
    """A control socket in ``folder``, on a fleet without VMs."""
    path = folder / CONTROL_SOCKET
    server = ControlServer(path)

    def emit(event: str, data: dict[str, Any]) -> None:
        assert not what_is_wrong(event, data)
        server.emit(event, data)

    fleet = StandInFleet(folder, emit)
    stop = asyncio.Event()
    server.listen()
    await server.start(CommandTable(fleet, server.emit, stop.set, fleet.reload))
    try:
        yield Served(path, server, fleet, stop)
    finally:
        await server.close()


class Agent:
    """A host agent in a thread of its own."""

    def __init__(self, loop: asyncio.AbstractEventLoop, served: Served) -> None:
        self._loop = loop
        self._served = served

    def add(self, name: str, change: Callable[[StandInVm], None] = lambda vm: None, **more: object) -> StandInVm:
        async def added() -> StandInVm:
            vm = self._served.fleet.add(name, **more)
            vm.go_on.set()
            change(vm)
            return vm

        return asyncio.run_coroutine_threadsafe(added(), self._loop).result(10)

    @property
    def names(self) -> list[str]:
        return sorted(self._served.fleet.machines)

    def do(self, what: Callable[[], object]) -> None:
        """Have something done in its thread."""

        async def done() -> None:
            what()

        asyncio.run_coroutine_threadsafe(done(), self._loop).result(10)


@contextmanager
def agent_in_thread(folder: Path) -> Iterator[Agent]:
    """A host agent whose control socket is in ``folder``."""
    ready: list[Agent] = []
    serving, over = threading.Event(), asyncio.Event()

    async def serve() -> None:
        async with served(folder) as found:
            ready.append(Agent(asyncio.get_running_loop(), found))
            serving.set()
            await over.wait()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    assert serving.wait(10)
    try:
        yield ready[0]
    finally:
        ready[0]._loop.call_soon_threadsafe(over.set)
        thread.join(10)
    assert not thread.is_alive()
