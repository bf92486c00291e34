"""What in a running QEMU makes discarding unsafe: asked before the guest runs, before every epoch, and in between.

By QMP for what QEMU knows of itself, by ``/proc`` for what it can not be asked. It may have been plugged in, or begun,
since the last look, by whoever else has a monitor.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Collection
from contextlib import suppress
from typing import Any

from hva_host.memory.backing import Backing
from hva_host.pager import refusals
from hva_host.pager.process_files import descriptors
from hvaqemu.errors import HvaError, PeerLost, RefusedError
from hvaqemu.qemu import unsafe
from hvaqemu.qemu.command import RAM_ID
from hvaqemu.qemu.qmp import QmpLink

_MIGRATION_OVER = frozenset(("none", "completed", "failed", "cancelled"))
#: Jobs that read or write all of guest RAM, and where a job's life ends (QEMU, qapi/job.json).
_SNAPSHOT_JOBS = frozenset(("snapshot-save", "snapshot-load", "snapshot-delete"))
_JOB_OVER = frozenset(("aborting", "concluded", "null"))
_FOLDERS = ("/machine/peripheral", "/machine/peripheral-anon", "/machine/unattached")
_BALLOON = "virtio-balloon"
#: Objects of no interest in the tree, by the beginning of their types.
_LEAVES = ("qemu:memory-region", "irq", "memory-region")
_OBJECTS_MAX = 2000
_RAM_LINK = "/memfd:memory-backend-memfd"


async def of_qemu(qmp: QmpLink, *, deep: bool, direct: Collection[str] = (), reporting: bool = False) -> str:
    """Why discarding is unsafe, as QEMU tells it, or "".

    :param deep: look below devices too, which takes some 20 ms; all that can be plugged in is found without.
    :param direct: nodes that may do direct I/O: epochs are bracketed for them.
    :param reporting: free page reporting is no reason: nothing of this VM is ever to be discarded.
    :raise HvaError: QEMU went, or did not answer.
    """
    looks: tuple[Callable[[QmpLink], Awaitable[str]], ...] = (_moving, _ram, _networks)
    for look in looks:
        if reason := await look(qmp):
            return reason
    if reason := await _disks(qmp, direct):
        return reason
    return await _devices(qmp, deep, reporting)


async def listen(qmp: QmpLink) -> None:
    """Have QEMU tell of migrations that somebody else begins; where it will not, they are found by asking."""
    with suppress(HvaError):
        capability = {"capability": "events", "state": True}
        await qmp.execute("migrate-set-capabilities", {"capabilities": [capability]})


def of_process(pid: int) -> str:
    """Why discarding is unsafe, as ``/proc`` tells it, or "". Takes some 50 µs a process of the host.

    :raise HvaError: the process is gone, or may not be looked into.
    """
    for number, link in descriptors(pid).items():
        if link.startswith(_RAM_LINK):
            try:
                ram = Backing(os.open(f"/proc/{pid}/fd/{number}", os.O_RDWR | os.O_CLOEXEC))
            except OSError as error:
                raise PeerLost(f"process {pid}: {error.strerror}") from error
            try:
                return _refusal(pid, ram)
            finally:
                ram.close()
    return f"process {pid} has no guest RAM in a memfd"


def _refusal(pid: int, ram: Backing) -> str:
    try:
        refusals.refuse(pid, ram)
    except RefusedError as error:
        return str(error)
    if others := refusals.mapped_elsewhere(pid, os.fstat(ram.fd)):
        return f"the guest's RAM is mapped by other processes too: {', '.join(others)}"
    return ""


async def _moving(qmp: QmpLink) -> str:
    """Whatever reads or writes all of RAM: an epoch beside it would only have to bring back what it discards."""
    status = (await qmp.migration()).status
    if status is not None and status not in _MIGRATION_OVER:
        return f"a migration is under way ({status})"
    for job in _dicts(await qmp.execute("query-jobs")):
        if job.get("type") in _SNAPSHOT_JOBS and job.get("status") not in _JOB_OVER:
            return f"a snapshot is under way (job {job.get('id')}, {job.get('type')})"
    dump = await qmp.execute("query-dump")
    if isinstance(dump, dict) and dump.get("status") == "active":
        return "a dump of the guest's memory is under way"
    return ""


async def _ram(qmp: QmpLink) -> str:
    if await qmp.memory_devices():
        return "the VM has hot-plugged memory"
    for backend in _dicts(await qmp.execute("query-memdev")):
        if backend.get("id") != RAM_ID:
            return f"the VM has a second memory back end ({backend.get('id')})"
        if not backend.get("share"):
            return "the guest's RAM is not shared memory"
    for name, kind in await _children(qmp, "/objects"):
        if name == RAM_ID:
            if kind != "memory-backend-memfd":
                return f"the guest's RAM is a {kind}, not a memfd"
        elif reason := unsafe.kind(kind):
            return f"object {name}: {reason}"
    return ""


async def _disks(qmp: QmpLink, direct: Collection[str]) -> str:
    for node in await qmp.block_nodes():
        if (node.cache.direct and node.node_name not in direct) or unsafe.block({"driver": node.driver}):
            return f"disk {node.node_name} ({node.driver}) is open for direct I/O; open it with cache.direct=off"
    return ""


async def _networks(qmp: QmpLink) -> str:
    # There is no QMP for it (7.2); the kinds are said as "type=KIND" (QEMU, net/net.c, print_net_client).
    said = await qmp.execute("human-monitor-command", {"command-line": "info network"})
    for word in str(said).replace(",", " ").split():
        key, _, value = word.partition("=")
        if key == "type" and (reason := unsafe.network_kind(value)):
            return f"network back end {reason}"
    return ""


async def _devices(qmp: QmpLink, deep: bool, reporting: bool) -> str:
    """Devices wherever they sit in the tree, and whether a balloon among them reports free pages."""
    left, seen = list(_FOLDERS), 0
    while left:
        folder = left.pop()
        for name, kind in await _children(qmp, folder):
            seen += 1
            if seen > _OBJECTS_MAX:
                return f"the VM has more than {_OBJECTS_MAX} devices; they can not all be looked at"
            if reason := unsafe.kind(kind):
                return f"device {name}: {reason}"
            if not reporting and kind.startswith(_BALLOON) and await _reports(qmp, f"{folder}/{name}"):
                return f"device {name}: free page reporting is on, and discards pages on its own"
            if deep and not kind.startswith(_LEAVES):
                left.append(f"{folder}/{name}")
    return ""


async def _reports(qmp: QmpLink, path: str) -> bool:
    try:
        return bool(await qmp.execute("qom-get", {"path": path, "property": "free-page-reporting"}))
    except HvaError as error:
        if "not found" in str(error):
            return False
        raise


async def _children(qmp: QmpLink, folder: str) -> list[tuple[str, str]]:
    """Names and types of the objects below one; none where it is gone."""
    try:
        answer = await qmp.execute("qom-list", {"path": folder})
    except HvaError as error:
        if "not found" in str(error):
            return []
        raise
    found = [(str(entry.get("name")), str(entry.get("type"))) for entry in _dicts(answer)]
    return [(name, kind[6:-1]) for name, kind in found if kind.startswith("child<")]


def _dicts(answer: object) -> list[dict[str, Any]]:
    return [entry for entry in answer if isinstance(entry, dict)] if isinstance(answer, list) else []
