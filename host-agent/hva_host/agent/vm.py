"""One running VM: its QEMU, pager and guest agent, and what can be asked of it.

A VM is made by :mod:`hva_host.agent.lifecycle` and owned by the fleet. What goes on beside requests: a new pager is
started whenever the present one dies, QMP is connected again, and :attr:`Vm.failure` says when the VM can not go on.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hva_host.agent import accounts, hazards, measures
from hva_host.agent.bounded_logs import keep_bounded
from hva_host.agent.chain_keeper import ChainKeeper
from hva_host.agent.chores import Chores
from hva_host.agent.condition import Condition, Listener
from hva_host.agent.discarded_list import DiscardedList
from hva_host.agent.freezer import Disks, connected
from hva_host.agent.guest_link import GuestLink
from hva_host.agent.guest_session import LinkState
from hva_host.agent.hazard_watch import HazardWatch
from hva_host.agent.hold import Hold
from hva_host.agent.holding import Holding
from hva_host.agent.layer_book import LayerBook
from hva_host.agent.layer_watch import LayerWatch
from hva_host.agent.model import (
    EpochStats,
    ExecResult,
    FrozenDisk,
    Measure,
    ReclaimResult,
    Sample,
    StallStats,
    VmState,
    VmStatus,
)
from hva_host.agent.monitor import Monitor
from hva_host.agent.pager_keeper import keep_pager
from hva_host.agent.pager_parent import PagerParent
from hva_host.agent.pager_process import PAGER_LOG, PagerHandle, call
from hva_host.agent.qmp_keeper import keep_qmp
from hva_host.agent.reclaim import Reclaimer
from hva_host.agent.records import VmFolder, VmRecord
from hva_host.agent.refusals import Refusals, Source
from hvaqemu.config import VmConfig
from hvaqemu.errors import HvaError, RefusedError
from hvaqemu.pages import PAGE_SHIFT
from hvaqemu.qemu import logs
from hvaqemu.qemu.command import direct_nodes
from hvaqemu.qemu.events import QmpEvent, Resume, Stop
from hvaqemu.qemu.launch import AGENT_SOCKET, CONSOLE_LOG, QEMU_LOG
from hvaqemu.qemu.process import QemuProcess, StopTimeouts
from hvaqemu.qemu.qmp import QmpLink
from hvaqemu.scenario_config import ReclaimState

#: Commands of an operator's that pause the guest or let it go on.
_PAUSING = ("stop", "cont")
_RESTORE_SECONDS_PER_GIB = 60.0
#: A guest that is held can not shut down, and a main loop that waits for a page can not quit.
_KILL = StopTimeouts(powerdown=0, quit=0, terminate=0)


class Vm:
    """One VM under this host agent."""

    def __init__(
        self,
        folder: VmFolder,
        record: VmRecord,
        process: QemuProcess,
        qmp: QmpLink,
        pagers: PagerParent,
        listener: Listener,
    ) -> None:
        self.folder = folder
        self.record = record
        self.process = process
        self.qmp = qmp
        self._listener = listener
        pages = record.config.memory >> PAGE_SHIFT
        #: Why nothing is discarded; whoever finds a reason puts it in here.
        self.refusals = Refusals(self._on_refusals)
        self.guest = GuestLink(folder.path / AGENT_SOCKET, pages=pages, on_change=self._on_guest)
        self.pager = PagerHandle(folder.path, pagers, self._on_pager_event)
        direct = direct_nodes(record.config.extra_disks)
        self.reclaimer = Reclaimer(
            pages,
            record.config.protection_limit,
            self._who_answers,
            lambda: self.pager,
            self._refuse_when_unsafe,
            self._on_epoch,
            record.config.store_limit,
            (lambda: self._hold.drain(self.qmp)) if direct else None,
        )
        self._list = DiscardedList(pages, self._who_answers, lambda: self.pager)
        self._hazards = HazardWatch(self.refusals, qmp, process, direct)
        self._monitor = Monitor(
            qmp,
            self.reclaimer.exclusive,
            self.refusals,
            self._hazards,
            self._room_needed,
            lambda: self.record.chains,
        )
        #: What goes on until the VM is let go.
        self._watches = Chores(self.name, self._on_bug)
        #: What goes on beside and ends by itself.
        self._chores = Chores(self.name, self._on_bug)
        self._hold = Hold(record.paused_for_hold, self._record_pause)
        self._condition = Condition(self.name, self.console_log, self._hold, listener)
        self.holding = Holding(self.name, self.pager, qmp, self._hold, self._condition, self._chores, listener)
        contents = zip(record.layers, record.contents, strict=True)
        self.layers = LayerWatch([(image, content) for (image, _), content in contents], self._on_layers)
        book = LayerBook(self, self.layers, lambda: self.pager, self._tell)
        chains = Disks(self, book, lambda: connected(self.qmp), self.reclaimer.exclusive, self._tell, self._available)
        #: Freezes and merges.
        self.disks = ChainKeeper(self.name, chains, record.config.freeze, lambda: self._hold.refuse(self.name))

    @property
    def name(self) -> str:
        return self.record.config.name

    @property
    def config(self) -> VmConfig:
        return self.record.config

    @property
    def console_log(self) -> Path:
        """What the guest printed on its console; the guest's text, never to be printed raw."""
        return self.folder.path / CONSOLE_LOG

    @property
    def state(self) -> VmState:
        """QEMU's state as far as it tells, or HELD, which no QEMU knows of."""
        return self._condition.state

    @property
    def failure(self) -> asyncio.Future[str]:
        """Done once the VM can not go on; says why. Whoever waits for the VM races this."""
        return self._condition.failure

    # Life cycle

    def supervise(self) -> None:
        """Begin to watch QEMU, pager and monitor."""
        self.guest.start()
        self.layers.start()
        self._watches.begin("QEMU", self._watch_qemu())
        self._watches.begin("pager", keep_pager(self.pager, self.process, lambda: self.record.layers, self))
        self._watches.begin("QMP", keep_qmp(self.qmp, self.process, self.follow))
        self._watches.begin("hazards", self._hazards.run())
        self._watches.begin("list of discarded pages", self._list.run())
        self._watches.begin("logs", keep_bounded(*self._logs()))
        self._watches.begin("disks", self.disks.run())

    def on_qmp_event(self, event: QmpEvent) -> None:
        """Follow QEMU's own account of the guest."""
        if self._hold.draining and isinstance(event, Stop | Resume):
            return
        self._hazards.on_qmp_event(event)
        self._condition.on_qmp_event(event)

    def running(self) -> None:
        """The guest runs now."""
        self._condition.running()

    async def stop(self, timeouts: StopTimeouts) -> str:
        """End the VM: softly, then hard, then say so; how it ended.

        :raise DeadlineExceeded: even SIGKILL did not end QEMU.
        """
        await self.reclaimer.cancel()
        # One that somebody stopped by a signal could not hear us.
        self.process.send_signal(signal.SIGCONT)
        qmp = self.qmp if self.qmp.connected else None
        report = await self.process.stop(qmp, _KILL if self._hold.active else timeouts)
        await self.pager.wait_ended(10.0)
        await self._let_go()
        return str(report.how)

    async def close(self) -> None:
        """Let go of the VM; it goes on."""
        await self.reclaimer.cancel()
        await self._let_go()

    async def wait_gone(self) -> str:
        """Wait until QEMU has ended; how it did."""
        return str(await asyncio.shield(self.process.exited))

    # What can be asked

    async def measure(self) -> Measure:
        """All figures of the VM's memory.

        :raise PeerLost: the pager does not answer and the VM is gone.
        """
        pager = await self._pager_status()
        # A guest that stands still would only be waited for.
        free = -1 if self._hold.active else await measures.guest_free(self.guest)
        images = [image for image, _ in self.record.layers]
        return await measures.measure(pager, self.process, self.pager.pid, images, free)

    async def sample(self) -> Sample:
        """One point of the timeline.

        :raise PeerLost: as :meth:`measure`.
        """
        return measures.sample(await self._pager_status(), self.process, self.reclaimer.report)

    async def status(self) -> VmStatus:
        """Everything ``status`` shows. Never raises for a peer that is silent or gone: it shows that."""
        pager: dict[str, Any] = {}
        measure = None
        with contextlib.suppress(HvaError):
            pager = await self.holding.ask()
            measure = await self.measure()
        hello = self.guest.hello
        refused = self.refusals.text
        if not refused and hello is not None and hello.checks_free_pages:
            refused = "unused: the guest checks the content of its free pages (page_poison)"
        return VmStatus(
            name=self.name,
            state=self.state,
            reason=self._condition.reason,
            reclaim_refused=refused,
            pid=self.process.pid,
            pager_pid=self.pager.pid,
            pager_restarts=self.record.pager_restarts,
            pager_pause_s=self.record.pager_pause_s,
            guest_connected=self.guest.connected,
            guest_kernel=logs.printable(hello.kernel) if hello else "",
            memory_bytes=self.config.memory,
            measure=measure,
            epochs=list(self.reclaimer.epochs),
            stalls=StallStats(**pager.get("stalls", {})),
            held=list(self._hold.pages),
            disks=self.disks.status(),
        )

    async def reclaim(
        self,
        states: Sequence[ReclaimState],
        *,
        epochs: int | None = None,
        on_epoch: Callable[[EpochStats], None] | None = None,
    ) -> ReclaimResult:
        """Run epochs until one gains less than 1 %, or exactly ``epochs`` of them.

        :raise RefusedError: something runs or is attached that makes discarding unsafe.
        :raise HvaError: a peer went or was silent.
        """
        self._condition.refuse_when_gone()
        self._hold.refuse(self.name)
        return await self.reclaimer.reclaim(states, epochs, on_epoch)

    def start_reclaiming(self, states: Sequence[ReclaimState], every: float) -> None:
        """Run an epoch every ``every`` seconds beside whatever else goes on, until :meth:`stop_reclaiming`.

        :raise RefusedError: that is going on already.
        """
        self.reclaimer.start(states, every)

    async def stop_reclaiming(self) -> ReclaimResult:
        """End what :meth:`start_reclaiming` began, after the epoch under way; what it did.

        :raise HvaError: what ended it before.
        """
        return await self.reclaimer.stop()

    async def freeze(self, disk: str | None) -> list[FrozenDisk]:
        """Make a layer of what the guest wrote to a disk, or to all of them.

        :raise HvaError: as :meth:`ChainKeeper.freeze`.
        """
        self._condition.refuse_when_gone()
        return await self.disks.freeze(disk)

    async def merge(self, disk: str | None) -> list[str]:
        """Merge the frozen files of a disk, or of each; files that went.

        :raise HvaError: as :meth:`ChainKeeper.merge`.
        """
        self._condition.refuse_when_gone()
        return await self.disks.merge(disk)

    async def restore(self) -> int:
        """Make every discarded page resident; how many were.

        :raise RefusedError: the host has no room for them, or pages are held.
        :raise HvaError: a peer went or was silent.
        """
        self._condition.refuse_when_gone()
        self._hold.refuse(self.name)
        async with self.reclaimer.exclusive:
            wanted, available = await self._room_needed()
            if available < wanted:
                raise RefusedError(
                    f"VM {self.name}: {wanted >> 20} MiB to restore and {available >> 20} MiB available on the host"
                )
            seconds = 30 + _RESTORE_SECONDS_PER_GIB * (wanted / (1 << 30))
            answer = await self.pager.link.call("restore", timeout=seconds)
        if answer["left"]:
            raise RefusedError(f"VM {self.name}: {answer['left']} pages can not be restored: {answer['why']}")
        return int(answer["pages"])

    async def resume(self) -> int:
        """Try held pages again; how many are still held.

        :raise HvaError: the pager went or was silent, or the guest could not be told to go on.
        """
        return await self.holding.resume()

    async def execute(
        self, argv: Sequence[str], *, timeout: float, stdin: bytes = b"", limit: int = 1 << 20
    ) -> ExecResult:
        """Run a command in the guest.

        :param timeout: seconds; then the command is killed.
        :param limit: bytes of output kept.
        :raise RefusedError: the VM's config does not allow it.
        :raise HvaError: the guest agent went, was silent, or could not start it.
        """
        if not self.config.allow_exec:
            raise RefusedError(f"VM {self.name}: commands in the guest are off", "set allow_exec: true in its file")
        self._condition.refuse_when_still()
        return await self.guest.execute(argv, timeout, stdin, limit)

    async def balloon(self, size: int, timeout: float) -> int:
        """Have the guest live with ``size`` bytes; bytes it has then.

        :raise HvaError: it did not get there in time, or QEMU refused.
        """
        self._condition.refuse_when_still()
        return await self.qmp.balloon(size, timeout)

    async def monitor(self, command: str, arguments: Mapping[str, object], timeout: float) -> object:
        """What QEMU returns to a QMP command of the operator's.

        :raise RefusedError: it would make discarding unsafe, or the VM is held.
        :raise HvaError: QEMU refused, went, or did not answer within ``timeout`` seconds.
        """
        self._condition.refuse_when_gone()
        if not command.startswith("query-"):
            self._hold.refuse(self.name)
        try:
            async with self._hold.by_operator(self.qmp) if command in _PAUSING else contextlib.nullcontext():
                return await self._monitor.execute(command, arguments, timeout)
        except RefusedError as error:
            raise RefusedError(f"VM {self.name}: {error.message}", error.hint) from error

    # Inside

    def _who_answers(self) -> GuestLink | None:
        """The guest agent, unless its guest is paused: waiting for it would only keep pages protected."""
        return self.guest if self.state is not VmState.PAUSED else None

    def _logs(self) -> list[Path]:
        return [self.folder.path / name for name in (CONSOLE_LOG, QEMU_LOG, PAGER_LOG)]

    async def _refuse_when_unsafe(self) -> None:
        self._hold.refuse(self.name)
        self.layers.look()
        try:
            await self._hazards.check()
        except RefusedError as error:
            raise RefusedError(f"VM {self.name}: {error.message}", error.hint) from error

    async def _room_needed(self) -> tuple[int, int]:
        """Bytes that are discarded, and bytes the host can still give to QEMU."""
        status = await self._pager_status()
        discarded = (status["zero_pages"] + status["layer_pages"] + status["preserved_pages"]) << PAGE_SHIFT
        return discarded, accounts.available_to(self.process.pid)

    async def _pager_status(self) -> dict[str, Any]:
        return await call(self.pager, "status")

    async def _let_go(self) -> None:
        await self._watches.cancel()
        await self._chores.settled()
        await self._hold.cancel()
        await self.layers.close()
        await self.guest.close()
        await self.pager.close()
        await self.qmp.close()
        self.process.close()

    def _on_pager_event(self, name: str, data: dict[str, Any]) -> None:
        if name == "held":
            self.holding.on_event(data)
        else:
            self.reclaimer.on_pager_event(name, data)

    def _on_layers(self, event: str, data: dict[str, Any]) -> None:
        self._listener(event, {"name": self.name, **data})
        self.refusals.set(Source.LAYERS, self.layers.reason)
        if self.layers.reason:
            # Nothing of an epoch under way is to depend on it either.
            self._chores.begin("abandon the epoch", self._abandon_epoch())

    async def _abandon_epoch(self) -> None:
        with contextlib.suppress(HvaError):
            await call(self.pager, "abandon")

    def _record_pause(self, ours: bool) -> None:
        if ours:
            # What is not recorded must not be paused: a host agent that died then would leave it paused for ever.
            self.store(paused_for_hold=True)
        else:
            self._store(paused_for_hold=False)

    def _store(self, **changes: Any) -> None:
        self.record = self.record.model_copy(update=changes)
        with contextlib.suppress(HvaError):
            self.folder.store(self.record)

    def store(self, **changes: Any) -> None:
        """Replace parts of the record, for what must not go on unrecorded.

        :raise HostError: no room; nothing has changed.
        """
        record = self.record.model_copy(update=changes)
        self.folder.store(record, keep=self.folder.keeps)
        self.record = record

    def _tell(self, event: str, data: dict[str, Any]) -> None:
        self._listener(event, {"name": self.name, **data})

    def _available(self) -> int:
        return accounts.available_to(self.process.pid)

    def _on_refusals(self, text: str) -> None:
        self._listener("RECLAIM_REFUSED" if text else "RECLAIM_ALLOWED", {"name": self.name, "reason": text})

    def _on_epoch(self, stats: EpochStats) -> None:
        self._list.epoch_ended()
        self._listener("EPOCH", {"name": self.name, "stats": stats.model_dump()})

    def _on_guest(self, state: LinkState) -> None:
        self._listener("GUEST_AGENT", {"name": self.name, "state": state.value})

    def _on_bug(self, task: str, error: BaseException) -> None:
        self._listener("TASK_FAILED", {"name": self.name, "task": task, "error": repr(error)})

    async def _watch_qemu(self) -> None:
        self._condition.gone(await self.wait_gone())

    # What becomes of the pager (:class:`PagerWatcher`)

    def pager_lost(self) -> None:
        self._listener("PAGER_LOST", {"name": self.name, "pid": self.pager.pid})

    def pager_failed(self, error: Exception) -> None:
        self._listener("PAGER_FAILED", {"name": self.name, "error": str(error)})
        self.holding.pager_failed(error)

    def pager_back(self, seconds: float) -> None:
        self.holding.pager_back()
        self._store(
            pager_restarts=self.record.pager_restarts + 1, pager_pause_s=max(seconds, self.record.pager_pause_s)
        )
        self._listener("PAGER_STARTED", {"name": self.name, "pid": self.pager.pid, "seconds": seconds})

    async def follow(self) -> None:
        """Catch up with what happened to the guest while nobody listened."""
        self._condition.catch_up(await self.qmp.status())
        await self._hold.connected(self.qmp)
        await hazards.listen(self.qmp)
