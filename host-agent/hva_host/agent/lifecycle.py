"""Starting a VM, whole or not at all, and taking over one that runs."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from pathlib import Path

from hva_host.agent import accounts, hazards, plan, vm_network
from hva_host.agent.condition import Listener
from hva_host.agent.layer_watch import content_of
from hva_host.agent.model import VmState
from hva_host.agent.pager_keeper import connect_or_start
from hva_host.agent.pager_parent import PagerParent
from hva_host.agent.records import VmFolder, VmRecord, disks_of
from hva_host.agent.vm import Vm
from hva_host.shim import ensure_shim
from hvaqemu.config import VmConfig
from hvaqemu.errors import DeadlineExceeded, HostError, HvaError, LaunchError, PeerLost, RefusedError
from hvaqemu.faultpoints import reach
from hvaqemu.network_config import TapNetwork
from hvaqemu.qemu.command import LaunchSockets, build_command, direct_nodes
from hvaqemu.qemu.events import QmpEvent
from hvaqemu.qemu.host_network import HostNetwork
from hvaqemu.qemu.launch import QEMU_LOG, QMP_SOCKET, launch
from hvaqemu.qemu.process import QemuProcess, StopTimeouts
from hvaqemu.qemu.qmp import QmpLink
from hvaqemu.qemu.race import race

_KILL = StopTimeouts(powerdown=0, quit=0, terminate=0)
#: Seconds for a QEMU that dies with its host agent.
_DYING_SECONDS = 2.0
#: Seconds in which the kernel tells us of a QEMU's death that others have met with.
_DEATH_SEEN_SECONDS = 2.0
#: For the monitor of a QEMU that is taken over, and of one whose main loop may wait for a page that is held.
_CONNECT_SECONDS, _CONNECT_HELD_SECONDS = 5.0, 2.0
#: QEMU's word (RunState, qapi/run-state.json) for a machine that was started with -S and has not run yet.
_NEVER_RAN = "prelaunch"


async def start_vm(
    config: VmConfig,
    folder: VmFolder,
    pagers: PagerParent,
    progress: plan.Progress,
    listener: Listener,
    *,
    die_with_parent: bool,
) -> Vm:
    """A running VM whose guest agent is connected. Whatever goes wrong, nothing is left behind.

    :raise HvaError: what went wrong, with the log's last words where QEMU or the guest had some.
    """
    async with AsyncExitStack() as undo:
        kept = folder.kept()
        host_network = HostNetwork(config.name, folder.path)
        undo.push_async_callback(_forget, folder, kept is not None, lambda: vm_network.remove_made(host_network))
        store = await asyncio.to_thread(plan.store_file, config)
        if store is not None:
            undo.callback(store.close)
        shim = await asyncio.to_thread(ensure_shim, progress)
        image = await asyncio.to_thread(plan.image_of, config, progress)
        if kept is not None:
            image = await asyncio.to_thread(plan.image_of_kept, config.name, image, kept)
            progress(f"booting from the disk that was kept of {config.name}")
        chains = plan.new_chains(config, image, folder.disks)
        fresh = chains
        if kept is not None:
            # What was swapped out is of no use to a guest that boots.
            fresh = chains[1:]
            chains = (kept.chain.without_qemu(), *fresh)
        files = plan.launch_files(config, image, runtime=folder.path, chains=chains)
        layers = await plan.layers_of(image, files.extra_disks, progress)
        contents = tuple([await asyncio.to_thread(content_of, path, index) for path, index in layers])
        folder.make_disks(chains[0] if kept is not None else None)
        await asyncio.to_thread(plan.make_disks, fresh)
        reach("agent.up.disks")
        network = await vm_network.make(host_network, config)
        progress("starting QEMU")
        events = _Relay()
        process, qmp = await launch(
            config,
            files,
            runtime=folder.path,
            shim=shim,
            on_event=events.deliver,
            store=None if store is None else store.fileno(),
            tap=host_network.tap if isinstance(config.network, TapNetwork) else None,
            die_with_parent=die_with_parent,
        )
        undo.push_async_callback(_end, process, qmp)
        host_network.handed_over()
        if store is not None:
            # QEMU's is the one that lasts: the file goes with it.
            store.close()
        reach("agent.up.launched")
        try:
            await hazards.listen(qmp)
            direct, reporting = direct_nodes(config.extra_disks), config.balloon.free_page_reporting
            if reason := await hazards.of_qemu(qmp, deep=True, direct=direct, reporting=reporting):
                raise RefusedError(f"VM {config.name}: {reason}", "take it out of qemu_args")
            record = VmRecord(
                config=config,
                qemu_pid=process.pid,
                qemu_start_time=process.start_time,
                layers=layers,
                contents=contents,
                chains=chains,
                network=network,
            )
            vm = Vm(folder, record, process, qmp, pagers, listener)
            undo.push_async_callback(vm.stop, _KILL)
            folder.store(record, keep=kept is not None or config.keep_disks)
            reach("agent.up.recorded")
            events.vm = vm
            progress("attaching the pager")
            await vm.pager.start(process.pid, layers)
        except (PeerLost, LaunchError) as error:
            # Whoever met with it first: if QEMU died, that is what there is to say.
            with suppress(DeadlineExceeded):
                raise PeerLost(f"VM {config.name}: {await process.wait(_DEATH_SEEN_SECONDS)}") from error
            raise
        reach("agent.up.attached")
        vm.supervise()
        progress("booting the guest")
        try:
            await qmp.cont()
            vm.running()
            reach("agent.up.running")
            await race(vm.guest.wait_connected(config.boot_timeout), config.boot_timeout + 5, "guest agent", vm.failure)
        except PeerLost as error:
            if vm.failure.done():
                raise PeerLost(f"VM {config.name}: {vm.failure.result()}") from error
            with suppress(DeadlineExceeded):
                raise PeerLost(f"VM {config.name}: {await process.wait(_DEATH_SEEN_SECONDS)}") from error
            raise PeerLost(f"VM {config.name}: {error}") from error
        undo.pop_all()
        return vm
    raise AssertionError("unreachable")


async def adopt_vm(folder: VmFolder, record: VmRecord, pagers: PagerParent, listener: Listener) -> Vm:
    """Take over a VM that another host agent left running.

    :raise PeerLost: its QEMU is gone, or has never run the guest: what is left of a start that failed.
    """
    process = QemuProcess.adopt(record.qemu_pid, record.qemu_start_time, folder.path / QEMU_LOG)
    events = _Relay()
    qmp = QmpLink(process, folder.path / QMP_SOCKET, events.deliver)
    vm = events.vm = Vm(folder, record, process, qmp, pagers, listener)
    reach("agent.adopt.found")
    began = time.monotonic()
    with suppress(HvaError, OSError):
        if await connect_or_start(vm.pager, process, record.layers):
            # It died while nobody looked: how long ago is not known, so this is the least it was.
            vm.pager_back(time.monotonic() - began)
        await vm.holding.learn()
    # A QEMU whose main loop waits for a fault answers no QMP; the supervisor tries again.
    never_ran = False
    with suppress(HvaError):
        await vm.qmp.connect(_CONNECT_HELD_SECONDS if vm.state is VmState.HELD else _CONNECT_SECONDS)
        never_ran = (await vm.qmp.status()).status == _NEVER_RAN
        await vm.follow()
    reach("agent.adopt.connected")
    if never_ran:
        await vm.close()
        raise PeerLost(f"VM {vm.name}: its host agent died before it ran")
    vm.supervise()
    return vm


async def _end(process: QemuProcess, qmp: QmpLink) -> None:
    """End a QEMU that no VM has yet; nothing, if its VM has done it."""
    await process.stop(None, _KILL)
    await qmp.close()
    process.close()


async def _forget(folder: VmFolder, keep: bool, remove_network: Callable[[], Awaitable[None]]) -> None:
    """Delete what a start that failed has made."""
    try:
        await remove_network()
    except HostError:
        # What failed before is what there is to say. The record stays for the next host agent.
        folder.release()
    else:
        folder.remove(keep=keep)


async def end_orphan(folder: VmFolder) -> None:
    """Make sure no QEMU of a half-started VM is left, then delete what it leaves.

    :raise HostError: its network can not be removed.
    """
    # By its log rather than by the record: a host agent may have died between starting QEMU and writing that down.
    for pid, start_time in accounts.writers(folder.path / QEMU_LOG):
        with suppress(PeerLost):
            process = QemuProcess.adopt(pid, start_time, folder.path / QEMU_LOG)
            await process.stop(None, _KILL)
            process.close()
    await vm_network.remove(folder)
    folder.remove()


def command_of(config: VmConfig, runtime: Path) -> list[str]:
    """The command line QEMU would be started with; nothing is started. It inherits descriptors 3 to 5.

    :raise HvaError: the image or a disk can not be used.
    """
    image = plan.image_of(config, lambda _line: None)
    folder = runtime / "vms" / config.name
    chains = plan.new_chains(config, image, disks_of(config.name))
    files = plan.launch_files(config, image, runtime=folder, chains=chains)
    return build_command(config.profile, config, files, LaunchSockets(qmp=3, agent=4, tap=5))


async def lives(record: VmRecord, folder: VmFolder) -> bool:
    """Whether the QEMU of a record still runs; one whose host agent was killed may be about to end."""
    try:
        process = QemuProcess.adopt(record.qemu_pid, record.qemu_start_time, folder.path / QEMU_LOG)
    except PeerLost:
        return False
    try:
        # A process nobody has reaped can still be opened; waiting tells it from a live one.
        await process.wait(_DYING_SECONDS)
    except DeadlineExceeded:
        return True
    finally:
        process.close()
    return False


class _Relay:
    """QMP events that come before there is a VM to tell are dropped: the guest does not run yet."""

    vm: Vm | None = None

    def deliver(self, event: QmpEvent) -> None:
        if self.vm is not None:
            self.vm.on_qmp_event(event)
