"""All VMs of this host agent."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

from hva_host.agent import records, vm_network
from hva_host.agent.chores import Chores
from hva_host.agent.condition import Listener
from hva_host.agent.governor import Governor
from hva_host.agent.lifecycle import adopt_vm, command_of, end_orphan, lives, start_vm
from hva_host.agent.pager_parent import PagerParent
from hva_host.agent.plan import Progress
from hva_host.agent.records import VmFolder
from hva_host.agent.vm import Vm
from hva_host.policy.samples import Limits
from hvaqemu.config import VmConfig
from hvaqemu.errors import ConfigError, HostError, HvaError, PeerLost, RefusedError
from hvaqemu.paths import runtime_dir
from hvaqemu.qemu.process import StopTimeouts
from hvaqemu.reclaim_config import ReclaimConfig

_DOWN = StopTimeouts()


def _ignore(_name: str, _data: dict[str, Any]) -> None:
    pass


class Fleet:
    """The VMs this process owns.

    :param runtime: the runtime directory.
    :param embedded: VMs die with this process; else they outlive it and the next host agent adopts them.
    :param on_event: told of everything that happens to a VM, as a name and data fit for JSON.
    """

    def __init__(self, runtime: Path, *, embedded: bool = False, on_event: Listener = _ignore) -> None:
        self._runtime = runtime
        self._embedded = embedded
        self._tell = on_event
        self._pagers = PagerParent()
        self._vms: dict[str, Vm] = {}
        self._names: dict[str, asyncio.Lock] = {}
        #: VMs that are not there yet.
        self._starting: dict[str, asyncio.Task[Vm]] = {}
        #: VMs of a host agent before us whose remains :meth:`start` has cleared away, and how they ended.
        self._cleared: dict[str, str] = {}
        #: VMs that run and that this version can not take over, and why.
        self._foreign: dict[str, HostError] = {}
        #: What policy keeps to, beside what each VM's config says.
        self.limits = Limits()
        self._policy = Chores(
            "fleet", lambda task, error: on_event("TASK_FAILED", {"task": task, "error": repr(error)})
        )
        self.governor = Governor(self.vms, lambda: self.limits, on_event, self._policy.failed)

    async def start(self) -> None:
        """Adopt the VMs nobody owns; what is left of dead ones is deleted. Policy begins."""
        # Without it pagers that live still serve; it is tried again when one is needed.
        with suppress(HostError):
            await self._pagers.prepare()
        # All at once: one that does not answer must not keep others waiting for a pager.
        await asyncio.gather(*(self._adopt_or_tell(name) for name in records.names(self._runtime)))
        self._govern()

    def _on_event(self, event: str, data: dict[str, Any]) -> None:
        self._tell(event, data)
        if event == "RECLAIM_CONFIG":
            self.governor.poke()

    def _govern(self) -> None:
        if not self._policy.busy:
            self._policy.begin("policy", self.governor.run())
        self.governor.poke()

    async def _adopt_or_tell(self, name: str) -> None:
        try:
            await self._adopt(name)
        except HvaError as error:
            if isinstance(error, HostError):
                self._foreign[name] = error
            self._on_event("VM_NOT_ADOPTED", {"name": name, "error": str(error)})

    async def _adopt(self, name: str) -> None:
        folder = VmFolder(self._runtime, name)
        try:
            record = folder.load()
            if record is not None:
                with suppress(PeerLost):
                    self._vms[name] = await adopt_vm(folder, record, self._pagers, self._on_event)
                    return
            await end_orphan(folder)
            self._cleared[name] = "its host agent was killed while it was starting" if record is None else "it was gone"
        except BaseException:
            folder.release()
            raise

    async def up(self, config: VmConfig, progress: Progress) -> Vm:
        """Start a VM and wait until its guest agent is connected.

        :param config: with absolute paths.
        :raise HvaError: what went wrong; nothing is left behind.
        """
        name = config.name
        lock = self._names.setdefault(name, asyncio.Lock())
        if lock.locked() or (name in self._vms and self._vms[name].process.alive):
            raise ConfigError(f"VM {name}: the name is taken", f"choose another, or 'hvaqemu down {name}' first")
        async with lock:
            if name in self._vms:
                await self._end(self._vms[name])
            folder = await self._claim(name)
            self._cleared.pop(name, None)
            starting = asyncio.create_task(
                start_vm(config, folder, self._pagers, progress, self._on_event, die_with_parent=self._embedded)
            )
            self._starting[name] = starting
            try:
                vm = await starting
            except asyncio.CancelledError:
                # It was ended by `down`, or who asked for it went; then it is still to be waited for.
                await asyncio.wait({starting})
                if (task := asyncio.current_task()) is not None and task.cancelling():
                    raise
                raise RefusedError(f"VM {name}: was ended by 'hvaqemu down' while it was starting") from None
            finally:
                del self._starting[name]
            self._vms[name] = vm
            self._govern()
            return vm

    async def _claim(self, name: str) -> VmFolder:
        """An empty folder for a new VM, without what a VM left whose host agent was killed."""
        folder = VmFolder(self._runtime, name)
        try:
            record = folder.load()
            if record is not None and await lives(record, folder):
                raise ConfigError(f"VM {name}: the name is taken", f"choose another, or 'hvaqemu down {name}' first")
            await end_orphan(folder)
        except BaseException:
            folder.release()
            raise
        return VmFolder(self._runtime, name)

    async def down(self, name: str, keep_disks: bool | None = None) -> str:
        """End a VM and delete what it leaves; how it ended.

        :param keep_disks: whether its root disk stays for the next VM of that name; None: if it was to be kept. With
            False, one that is not running may be named too, whose disk was kept.
        :raise ConfigError: no such VM.
        :raise DeadlineExceeded: QEMU can not be ended.
        """
        if (starting := self._starting.get(name)) is not None:
            starting.cancel()
            await asyncio.wait({starting})
            return "it was still starting"
        if name in self._cleared and keep_disks is not False:
            return self._cleared.pop(name)
        if keep_disks is False and name not in self._vms and name not in self._foreign:
            return self._delete_kept(name)
        self.get(name)
        async with self._names.setdefault(name, asyncio.Lock()):
            # Asked again: another request may have ended it while this one waited.
            return await self._end(self.get(name), keep_disks)

    async def _end(self, vm: Vm, keep_disks: bool | None = None) -> str:
        how = await vm.stop(_DOWN)
        if keep_disks:
            vm.folder.store(vm.record, keep=True)
        await vm_network.remove(vm.folder)
        vm.folder.remove(keep_disks)
        del self._vms[vm.name]
        return how

    def _delete_kept(self, name: str) -> str:
        self._cleared.pop(name, None)
        if not (records.disks_of(name)).exists():
            self.get(name)
        VmFolder(self._runtime, name).remove(keep=False)
        return "its disk was kept"

    def set_reclaim(self, name: str, reclaim: ReclaimConfig) -> None:
        """Change how a VM's memory is reclaimed; its guest is not touched.

        :raise ConfigError: no such VM.
        :raise RefusedError: its QEMU discards pages by itself.
        :raise HostError: no room to record it; nothing has changed.
        """
        self.get(name).set_reclaim(reclaim)

    def set_limits(self, limits: Limits) -> None:
        """Change what policy keeps to on this host."""
        self.limits = limits
        self.governor.poke()

    def get(self, name: str) -> Vm:
        """The VM of that name.

        :raise ConfigError: there is none.
        """
        if name in self._foreign and name not in self._vms:
            raise self._foreign[name]
        if name not in self._vms:
            known = ", ".join(self._vms) or "none is running"
            raise ConfigError(f"VM {name}: no such VM", f"known: {known}")
        return self._vms[name]

    @property
    def starting(self) -> Collection[str]:
        """Names of VMs that are not there yet."""
        return self._starting.keys()

    def vms(self) -> list[Vm]:
        """All VMs, by name."""
        return [self._vms[name] for name in sorted(self._vms)]

    async def close(self) -> None:
        """Let go of all VMs: they go on; embedded ones are ended."""
        await self._policy.cancel()
        for vm in self.vms():
            if self._embedded:
                with suppress(HvaError):
                    await self.down(vm.name)
            else:
                await vm.close()
                vm.folder.release()
        self._vms.clear()
        await asyncio.to_thread(self._pagers.close)


def prepare_command(config: VmConfig) -> list[str]:
    """The command line QEMU would be started with; builds the image if need be, starts nothing.

    :raise HvaError: the image or a disk can not be used.
    """
    return command_of(config, runtime_dir())
