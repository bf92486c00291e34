"""What can be asked of a running VM, whoever asks: the control socket, a scenario, policy."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hva_host.agent import accounts, measures, versions
from hva_host.agent.chain_keeper import ChainKeeper
from hva_host.agent.condition import Condition, Listener
from hva_host.agent.guest_link import GuestLink
from hva_host.agent.history import History, VmReport
from hva_host.agent.hold import Hold
from hva_host.agent.holding import Holding
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
from hva_host.agent.pager_process import PagerHandle, call
from hva_host.agent.policy_status import policy_status
from hva_host.agent.ram_frames import RamFrame, RamMapper
from hva_host.agent.reclaim import Reclaimer
from hva_host.agent.records import VmFolder, VmRecord
from hva_host.agent.refusals import Refusals
from hva_host.policy.decisions import View
from hvaqemu.config import VmConfig
from hvaqemu.errors import HvaError, RefusedError
from hvaqemu.pages import PAGE_SHIFT
from hvaqemu.qemu import logs
from hvaqemu.qemu.launch import CONSOLE_LOG
from hvaqemu.qemu.process import QemuProcess
from hvaqemu.qemu.qmp import QmpLink
from hvaqemu.reclaim_config import ReclaimConfig, ReclaimMode, ReclaimState

#: Commands of an operator's that pause the guest or let it go on.
_PAUSING = ("stop", "cont")
_RESTORE_SECONDS_PER_GIB = 60.0


class AskedVm:
    """The requests of a VM; :class:`hva_host.agent.vm.Vm` puts together what they are carried out with.

    :ivar balloon_bytes: what the balloon leaves the guest; None: QEMU has not said yet.
    :ivar view: what policy thinks of the VM; None: it does not govern it.
    :ivar refusals: why nothing is discarded; whoever finds a reason puts it in here.
    :ivar disks: freezes and merges.
    """

    folder: VmFolder
    record: VmRecord
    process: QemuProcess
    qmp: QmpLink
    guest: GuestLink
    pager: PagerHandle
    reclaimer: Reclaimer
    refusals: Refusals
    history: History
    holding: Holding
    disks: ChainKeeper
    balloon_bytes: int | None = None
    view: View | None = None
    _listener: Listener
    _condition: Condition
    _hold: Hold
    _mapper: RamMapper
    _monitor: Monitor

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

    async def measure(self, *, patience: float = 10.0) -> Measure:
        """All figures of the VM's memory.

        :param patience: seconds for the guest's own figure.
        :raise PeerLost: the pager does not answer and the VM is gone.
        """
        pager = await self.pager_status()
        # A guest that stands still would only be waited for.
        free = -1 if self._hold.active else await measures.guest_free(self.guest, patience)
        images = [image for image, _ in self.record.layers]
        return await measures.measure(pager, self.process, self.pager.pid, images, free)

    async def sample(self) -> Sample:
        """One point of the timeline.

        :raise PeerLost: as :meth:`measure`.
        """
        return measures.sample(await self.pager_status(), self.process, self.pager.pid, self.reclaimer.report)

    async def ram_frame(self) -> RamFrame:
        """The map of guest RAM, now.

        :raise HvaError: the pager went or was silent, or QEMU went.
        """
        return await self._mapper.frame(self._uptime(), self.pager, self.reclaimer.report)

    async def status(self) -> VmStatus:
        """Everything ``status`` shows. Never raises for a peer that is silent or gone: it shows that."""
        pager: dict[str, Any] = {}
        measure = None
        with contextlib.suppress(HvaError):
            pager = await self.holding.ask()
            # Who asks how a VM is asks also about one that is slow.
            measure = await self.measure(patience=2.0)
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
            states=measures.states(self.reclaimer.report),
            epochs=list(self.reclaimer.epochs),
            stalls=StallStats(**pager.get("stalls", {})),
            held=list(self._hold.pages),
            disks=self.disks.status(),
            network=self.record.network,
            policy=policy_status(self.config.reclaim, self.view, time.monotonic()),
        )

    async def report(self) -> VmReport:
        """Everything a report shows. Never raises for a peer that is silent or gone: it shows that."""
        await self.history.look()
        status = await self.status()
        found = versions.ours()
        with contextlib.suppress(HvaError):
            found["QEMU"] = await versions.of_qemu(self.qmp)
        if status.guest_kernel:
            found["guest kernel"] = status.guest_kernel
        return VmReport(
            status=status,
            timeline=self.history.samples,
            ram=self.history.frames,
            configuration=self.config.model_dump(mode="json"),
            versions=found,
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
        self._refuse_when_off()
        return await self.reclaimer.reclaim(states, epochs, on_epoch)

    def start_reclaiming(self, states: Sequence[ReclaimState], every: float) -> None:
        """Run an epoch every ``every`` seconds beside whatever else goes on, until :meth:`stop_reclaiming`.

        :raise RefusedError: that is going on already, or the config says "off".
        """
        self._refuse_when_off()
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

    async def balloon(self, size: int, timeout: float, *, taken: int = 0) -> int:
        """Have the guest live with ``size`` bytes; bytes it has then.

        :param taken: bytes that are policy's to give back then; what anybody else takes is not.
        :raise HvaError: it did not get there in time, or QEMU refused.
        """
        self._condition.refuse_when_still()
        # Asked, because QEMU's events of it come up to a second late.
        before, had = self.record.ballooned_bytes, await self.qmp.balloon_actual()
        if taken > before:
            # A host agent that dies from here on has the next one give it back.
            self.store(ballooned_bytes=taken)
        try:
            self.balloon_bytes = await self.qmp.balloon(size, timeout)
        except HvaError:
            if taken != before:
                await self._balloon_stays(before, taken, had)
            raise
        if taken < before:
            self.store(ballooned_bytes=taken)
        return self.balloon_bytes

    async def balloon_back(self, timeout: float) -> int:
        """Give the guest back what policy took by its balloon; bytes it has then. Raises as :meth:`balloon`."""
        self._condition.refuse_when_still()
        # It may still be on its way somewhere.
        size = await self.qmp.balloon_as_it_is() + self.record.ballooned_bytes
        return await self.balloon(min(self.config.memory, size), timeout)

    async def _balloon_stays(self, before: int, taken: int, had: int) -> None:
        """A change by policy came to an end on its way: what is owed to the guest is what it has given, and no more."""
        with contextlib.suppress(HvaError):
            self.balloon_bytes = await self.qmp.balloon_as_it_is()
            owed = before + had - self.balloon_bytes
            self.store(ballooned_bytes=max(min(before, taken), min(max(before, taken), owed)))

    def set_reclaim(self, reclaim: ReclaimConfig) -> None:
        """From now on, and for every host agent to come, the VM's memory is reclaimed so.

        :raise RefusedError: the VM's QEMU discards pages by itself, as long as it runs.
        :raise HostError: no room to record it; nothing has changed.
        """
        if reclaim.mode is not ReclaimMode.OFF:
            self._refuse_when_reporting()
        self.store(config=self.config.model_copy(update={"reclaim": reclaim}))
        self._listener("RECLAIM_CONFIG", {"name": self.name, "reclaim": reclaim.model_dump(mode="json")})

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

    async def pager_status(self) -> dict[str, Any]:
        """What the pager knows.

        :raise HvaError: it went or was silent, and no new one came in time.
        """
        return await call(self.pager, "status")

    def store(self, **changes: Any) -> None:
        """Replace parts of the record, for what must not go on unrecorded.

        :raise HostError: no room; nothing has changed.
        """
        record = self.record.model_copy(update=changes)
        self.folder.store(record, keep=self.folder.keeps)
        self.record = record

    # Inside

    def _uptime(self) -> float:
        """Seconds since the VM started."""
        return accounts.uptime(self.process.start_time)

    def _refuse_when_reporting(self) -> None:
        # Whatever the config says, the look before each epoch refuses it as well.
        if self.config.balloon.free_page_reporting:
            raise RefusedError(
                f"VM {self.name}: reclaim is off: its guest reports free pages to QEMU, which discards them",
                "start it without balloon.free_page_reporting",
            )

    def _refuse_when_off(self) -> None:
        self._refuse_when_reporting()
        if self.config.reclaim.mode is ReclaimMode.OFF:
            raise RefusedError(f"VM {self.name}: reclaim is off", f"hvaqemu set {self.name} reclaim.mode=manual")

    async def _room_needed(self) -> tuple[int, int]:
        """Bytes that are discarded, and bytes the host can still give to QEMU."""
        status = await self.pager_status()
        discarded = (status["zero_pages"] + status["layer_pages"] + status["preserved_pages"]) << PAGE_SHIFT
        return discarded, accounts.available_to(self.process.pid)
