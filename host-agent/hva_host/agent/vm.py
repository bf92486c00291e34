"""One running VM: its QEMU, pager and guest agent, and what goes on beside requests (:mod:`hva_host.agent.vm_asked`).

A VM is made by :mod:`hva_host.agent.lifecycle` and owned by the fleet. A new pager is started whenever the present one
dies, QMP is connected again, and :attr:`Vm.failure` says when the VM can not go on.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
from pathlib import Path
from typing import Any

from hva_host.agent import accounts, hazards, vm_network
from hva_host.agent.bounded_logs import keep_bounded
from hva_host.agent.chain_keeper import ChainKeeper
from hva_host.agent.chores import Chores
from hva_host.agent.condition import Condition, Listener
from hva_host.agent.discarded_list import DiscardedList
from hva_host.agent.freezer import Disks, connected
from hva_host.agent.guest_link import GuestLink
from hva_host.agent.guest_session import LinkState
from hva_host.agent.hazard_watch import HazardWatch
from hva_host.agent.history import History
from hva_host.agent.hold import Hold
from hva_host.agent.holding import Holding
from hva_host.agent.layer_book import LayerBook
from hva_host.agent.layer_watch import LayerWatch
from hva_host.agent.model import EpochStats, VmState
from hva_host.agent.monitor import Monitor
from hva_host.agent.pager_keeper import keep_pager
from hva_host.agent.pager_parent import PagerParent
from hva_host.agent.pager_process import PAGER_LOG, PagerHandle, call
from hva_host.agent.qmp_keeper import keep_qmp
from hva_host.agent.ram_frames import RamMapper, seconds_between
from hva_host.agent.reclaim import Reclaimer
from hva_host.agent.records import VmFolder, VmRecord
from hva_host.agent.refusals import Refusals, Source
from hva_host.agent.vm_asked import AskedVm
from hvaqemu.errors import HvaError, RefusedError
from hvaqemu.pages import PAGE_SHIFT
from hvaqemu.qemu.command import direct_nodes
from hvaqemu.qemu.events import BalloonChange, QmpEvent, Resume, Stop
from hvaqemu.qemu.launch import AGENT_SOCKET, CONSOLE_LOG, QEMU_LOG
from hvaqemu.qemu.process import QemuProcess, StopTimeouts
from hvaqemu.qemu.qmp import QmpLink

#: A guest that is held can not shut down, and a main loop that waits for a page can not quit.
_KILL = StopTimeouts(powerdown=0, quit=0, terminate=0)


class Vm(AskedVm):
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
            self._uptime,
        )
        self._mapper = RamMapper(pages, process.pid)
        self.history = History(self.sample, self.ram_frame, seconds_between(pages))
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
        self.disks = ChainKeeper(self.name, chains, record.config.freeze, lambda: self._hold.refuse(self.name))

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
        self._watches.begin("history", self.history.run())

    def on_qmp_event(self, event: QmpEvent) -> None:
        """Follow QEMU's own account of the guest."""
        if self._hold.draining and isinstance(event, Stop | Resume):
            return
        self._hazards.on_qmp_event(event)
        if isinstance(event, BalloonChange):
            self.balloon_bytes = event.actual
        self._condition.on_qmp_event(event)

    def running(self) -> None:
        """The guest runs now, with all of its memory."""
        self.balloon_bytes = self.config.memory
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

    def _tell(self, event: str, data: dict[str, Any]) -> None:
        self._listener(event, {"name": self.name, **data})

    def _available(self) -> int:
        return accounts.available_to(self.process.pid)

    def _on_refusals(self, text: str) -> None:
        self._listener("RECLAIM_REFUSED" if text else "RECLAIM_ALLOWED", {"name": self.name, "reason": text})

    def _on_epoch(self, stats: EpochStats) -> None:
        self._list.epoch_ended()
        self.history.epoch_ended()
        self._listener("EPOCH", {"name": self.name, "stats": stats.model_dump()})

    def _on_guest(self, state: LinkState) -> None:
        self._listener("GUEST_AGENT", {"name": self.name, "state": state.value})

    def _on_bug(self, task: str, error: BaseException) -> None:
        self._listener("TASK_FAILED", {"name": self.name, "task": task, "error": repr(error)})

    async def _watch_qemu(self) -> None:
        self._condition.gone(await self.wait_gone())
        # Its tap device has gone with it; what else was made for it need not wait for `down`.
        with contextlib.suppress(HvaError):
            await vm_network.remove(self.folder)

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
        with contextlib.suppress(HvaError):
            # A guest whose kernel has not come to its balloon yet has all of its memory.
            self.balloon_bytes = await self.qmp.balloon_actual()
