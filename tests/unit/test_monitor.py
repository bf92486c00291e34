"""What an operator may tell QEMU's monitor through hvaqemu."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hva_host.agent.hazard_watch import HazardWatch
from hva_host.agent.monitor import Arguments, Monitor, refusal, uses_whole_ram
from hva_host.agent.refusals import Refusals, Source
from hvaqemu.errors import HvaError, PeerLost, RefusedError
from hvaqemu.qemu.qmp import QmpLink

ALLOWED: list[tuple[str, dict[str, Any]]] = [
    ("query-status", {}),
    ("stop", {}),
    ("system_reset", {}),
    ("device_add", {"driver": "virtio-tablet-ccw", "id": "t"}),
    ("netdev_add", {"type": "user", "id": "n"}),
    ("netdev_add", {"type": "tap", "id": "n", "vhost": False, "script": "no", "downscript": "no"}),
    ("object-add", {"qom-type": "iothread", "id": "io"}),
    ("blockdev-add", {"driver": "qcow2", "node-name": "n", "backing": "golden", "file": {"driver": "file"}}),
    ("blockdev-add", {"driver": "file", "filename": "/x", "cache": {"direct": False}}),
    ("migrate", {"uri": "unix:/x"}),
    ("migrate-set-capabilities", {"capabilities": [{"capability": "postcopy-ram", "state": False}]}),
    ("migrate-set-capabilities", {"capabilities": [{"capability": "xbzrle", "state": True}]}),
    ("qom-set", {"path": "/machine/peripheral/balloon0", "property": "guest-stats-polling-interval", "value": 2}),
    ("human-monitor-command", {"command-line": "info network"}),
    ("human-monitor-command", {"command-line": "savevm x"}),
    ("block-commit", {"device": "top", "base-node": "middle"}),
    ("query-named-block-nodes", {"node-name": "golden"}),
    (
        "transaction",
        {"actions": [{"type": "blockdev-snapshot-internal-sync", "data": {"device": "root", "name": "x"}}]},
    ),
]
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("device_add", {"driver": "vhost-vsock-ccw", "guest-cid": 3}, "kernel vhost"),
    ("device_add", {"driver": "virtio-mem-pci"}, "plugs and unplugs"),
    ("device_add", {"driver": "vhost-user-fs-ccw", "chardev": "c"}, "another process"),
    ("device_add", {"driver": "vfio-pci", "host": "0"}, "pins"),
    ("device_add", {"driver": "virtio-balloon-ccw", "free-page-reporting": True}, "free page reporting"),
    ("object-add", {"qom-type": "memory-backend-ram", "id": "x", "size": 1}, "one memory back end"),
    ("netdev_add", {"type": "tap", "id": "n", "vhost": True}, "kernel vhost"),
    ("netdev_add", {"type": "tap", "id": "n"}, "start no programs"),
    ("netdev_add", {"type": "vhost-user", "id": "n", "chardev": "c"}, "another process"),
    ("blockdev-add", {"driver": "file", "filename": "/x", "cache": {"direct": True}}, "direct I/O"),
    ("blockdev-add", {"driver": "raw", "file": {"driver": "nvme"}}, "direct I/O"),
    ("blockdev-reopen", {"options": [{"driver": "file", "cache": {"direct": True}}]}, "direct I/O"),
    ("blockdev-reopen", {"options": [{"node-name": "golden", "read-only": False}]}, "never changes"),
    ("blockdev-mirror", {"device": "root", "target": "golden", "sync": "full"}, "never changes"),
    ("block-commit", {"device": "root"}, "give base-node"),
    ("block-commit", {"device": "root", "base-node": "golden"}, "never changes"),
    ("blockdev-change-medium", {"id": "x", "filename": "/x"}, "guess"),
    ("migrate", {"uri": "exec:cat"}, "no programs"),
    ("migrate", {"uri": "rdma:host:1"}, "pins"),
    ("migrate-incoming", {"uri": "tcp::1"}, "arrives"),
    ("migrate-start-postcopy", {}, "userfaultfd of its own"),
    (
        "migrate-set-capabilities",
        {"capabilities": [{"capability": "xbzrle", "state": True}, {"capability": "postcopy-ram", "state": True}]},
        "userfaultfd of its own",
    ),
    (
        "migrate-set-capabilities",
        {"capabilities": [{"capability": "background-snapshot", "state": True}]},
        "userfaultfd of its own",
    ),
    ("migrate-set-capabilities", {"capabilities": [{"capability": "x-colo", "state": True}]}, "second copy"),
    ("qom-set", {"path": "/objects/ram0", "property": "merge", "value": True}, "stays as it was made"),
    ("qom-set", {"path": "ram0", "property": "merge", "value": True}, "stays as it was made"),
    ("qom-set", {"path": "/x/balloon0", "property": "free-page-reporting", "value": True}, "free page reporting"),
    ("human-monitor-command", {"command-line": "device_add vfio-pci"}, "use the QMP command"),
    ("human-monitor-command", {"command-line": " migrate tcp:x:1"}, "use the QMP command"),
    ("getfd", {"fdname": "x"}, "monitor of your own"),
    ("quit", {}, "hvaqemu down"),
    (
        "transaction",
        {"actions": [{"type": "x", "data": {}}, {"type": "drive-backup", "data": {"target": "/x"}}]},
        "guess",
    ),
]


@pytest.mark.parametrize(("command", "arguments"), ALLOWED)
def test_what_does_no_harm_is_passed_on(command: str, arguments: dict[str, Any]) -> None:
    assert refusal(command, arguments) == ""


@pytest.mark.parametrize(("command", "arguments", "named"), REFUSED)
def test_what_would_be_unsafe_is_refused_by_name(command: str, arguments: dict[str, Any], named: str) -> None:
    assert named in refusal(command, arguments)


@pytest.mark.parametrize(("command", "arguments", "named"), REFUSED)
def test_a_transaction_hides_nothing(command: str, arguments: dict[str, Any], named: str) -> None:
    inner = {"type": command, "data": arguments}
    assert named in refusal("transaction", {"actions": [{"type": "abort", "data": {}}, inner]})


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(
    st.sampled_from([command for command, *_ in REFUSED]),
    st.dictionaries(
        st.sampled_from(["capabilities", "actions", "options", "path", "property", "command-line", "uri"])
        | st.text(max_size=5),
        json_values,
        max_size=4,
    ),
)
def test_any_json_is_answered(command: str, arguments: dict[str, Any]) -> None:
    assert isinstance(refusal(command, arguments), str)
    uses_whole_ram(command, arguments)


class _Qemu:
    """The seam: a link that notes what it was told, and what was refused at that moment."""

    connected = True

    def __init__(self, refusals: Refusals) -> None:
        self.refusals = refusals
        self.told: list[tuple[str, str]] = []
        self.fails = False

    async def execute(self, command: str, arguments: Arguments | None = None, *, timeout: float = 1.0) -> object:
        self.told.append((command, self.refusals.text))
        if self.fails:
            raise PeerLost("QEMU is gone")
        return {}


class _Looks:
    def __init__(self) -> None:
        self.count = 0

    async def look(self) -> None:
        self.count += 1


def _monitor(discarded: int = 0, available: int = 1 << 30) -> tuple[Monitor, _Qemu, asyncio.Lock, _Looks, list[str]]:
    heard: list[str] = []
    refusals, exclusive, looks = Refusals(heard.append), asyncio.Lock(), _Looks()
    qemu = _Qemu(refusals)

    async def room() -> tuple[int, int]:
        return discarded, available

    monitor = Monitor(cast(QmpLink, qemu), exclusive, refusals, cast(HazardWatch, looks), room)
    return monitor, qemu, exclusive, looks, heard


async def test_what_reads_all_of_ram_waits_for_the_epoch_and_keeps_the_next_away() -> None:
    monitor, qemu, exclusive, looks, heard = _monitor()
    await exclusive.acquire()
    command = asyncio.create_task(monitor.execute("pmemsave", {"val": 0, "size": 1, "filename": "/x"}, 5.0))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert heard == ["QMP pmemsave is under way"]
    assert qemu.told == []
    exclusive.release()
    await command
    assert qemu.told == [("pmemsave", "QMP pmemsave is under way")]
    assert heard == ["QMP pmemsave is under way", ""]
    assert looks.count == 1
    assert not exclusive.locked()


async def test_two_at_once_keep_epochs_away_until_both_are_done() -> None:
    monitor, qemu, exclusive, _, heard = _monitor()
    await exclusive.acquire()
    arguments = {"val": 0, "size": 1, "filename": "/x"}
    both = [asyncio.create_task(monitor.execute("pmemsave", arguments, 5.0)) for _ in range(2)]
    await asyncio.sleep(0.01)
    exclusive.release()
    await asyncio.gather(*both)
    assert heard[0] == "QMP pmemsave is under way"
    assert heard[1] == "QMP pmemsave, pmemsave is under way"
    assert heard[-1] == ""
    assert all(reason for _, reason in qemu.told)


async def test_anything_else_waits_for_nothing() -> None:
    monitor, qemu, exclusive, looks, heard = _monitor()
    async with exclusive:
        await monitor.execute("query-status", {}, 5.0)
    assert qemu.told == [("query-status", "")]
    assert (looks.count, heard) == (1, [])


async def test_a_refusal_tells_qemu_nothing() -> None:
    monitor, qemu, _, _, _ = _monitor()
    with pytest.raises(RefusedError, match="QMP device_add: vfio-pci: it pins"):
        await monitor.execute("device_add", {"driver": "vfio-pci"}, 5.0)
    assert qemu.told == []


async def test_what_would_bring_back_more_than_there_is_room_for_is_refused() -> None:
    monitor, qemu, _, _, heard = _monitor(discarded=200 << 20, available=100 << 20)
    with pytest.raises(RefusedError, match=r"brings back 200\.0 MiB, and the host has 100\.0 MiB available.*restore"):
        await monitor.execute("migrate", {"uri": "tcp:x:1"}, 5.0)
    assert qemu.told == []
    assert heard[-1] == ""
    await monitor.execute("pmemsave", {"val": 0, "size": 1 << 20, "filename": "/x"}, 5.0)
    assert len(qemu.told) == 1


async def test_reclaim_goes_on_after_a_failure() -> None:
    monitor, qemu, _, _, heard = _monitor()
    qemu.fails = True
    with pytest.raises(HvaError):
        await monitor.execute("migrate", {"uri": "tcp:x:1"}, 5.0)
    assert heard == ["QMP migrate is under way", ""]
    assert monitor._refusals.text == ""
    monitor._refusals.check(Source.MONITOR)
