"""Networks made on this host for VMs, without a VM: what is made, who may remove it, and what is never touched."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from hva_host.agent import vm_network
from hvaqemu.config import VmConfig
from hvaqemu.errors import ConfigError, HostError
from hvaqemu.network_config import TapNetwork
from hvaqemu.qemu import host_network, links
from hvaqemu.qemu.host_network import NAMESPACES, RECORD, HostNetwork
from hvaqemu.units import MiB
from tests.networks import MARK, a_bridge, devices, ip, namespaces

pytestmark = pytest.mark.usefixtures("networks_allowed")

_MAC = "52:54:00:12:34:56"
_ADDRESS = "10.213.7.2/24"
_NAME = f"{MARK}-vm"


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    assert not devices() + namespaces()
    yield
    assert not devices() + namespaces()


@pytest.fixture
def host(tmp_path: Path) -> Iterator[HostNetwork]:
    made = HostNetwork(_NAME, tmp_path)
    yield made
    made.remove()


def tap(**keys: str) -> TapNetwork:
    return TapNetwork.model_validate({"type": "tap", **keys})


def test_between_host_and_guest(host: HostNetwork) -> None:
    made = host.make(tap(address=_ADDRESS), _MAC)
    assert devices() == [made.link]
    (shown,) = json.loads(ip("-j", "addr", "show", made.link))
    assert shown["address"] == "fe:54:00:12:34:56"
    assert ("10.213.7.1", 24) in [(each["local"], each["prefixlen"]) for each in shown["addr_info"]]
    # With the descriptor it goes, addresses, routes and all: nobody has to be there to remove it.
    host.handed_over()
    assert devices() == []


def test_a_namespace_of_its_own(host: HostNetwork, tmp_path: Path) -> None:
    name = f"{MARK}-ns"
    made = host.make(tap(address=_ADDRESS, namespace=name), _MAC)
    assert namespaces() == [name]
    assert devices() == [made.link]
    inside = {each["ifname"]: each for each in json.loads(ip("-j", "-n", name, "link"))}
    assert {port for port, each in inside.items() if each.get("master") == "bridge0"} == {"uplink", "tap0"}
    assert all("UP" in each["flags"] for each in inside.values())
    # Another host agent, which knows no more than the record.
    HostNetwork(_NAME, tmp_path).remove()
    assert namespaces() == []
    assert not (tmp_path / RECORD).exists()


def test_a_bridge_is_left_as_it_is(host: HostNetwork) -> None:
    with a_bridge(f"{MARK}b", "10.213.7.1/24") as bridge:
        (before,) = json.loads(ip("-j", "addr", "show", bridge))
        made = host.make(tap(bridge=bridge), _MAC)
        (port,) = json.loads(ip("-j", "link", "show", made.link))
        assert port["master"] == bridge
        host.remove()
        assert devices() == [bridge]
        (left,) = json.loads(ip("-j", "addr", "show", bridge))
        for key in ("address", "mtu", "ifalias", "master"):
            assert left.get(key) == before.get(key), key
        for shown in (left, before):
            assert [each["local"] for each in shown["addr_info"] if each["family"] == "inet"] == ["10.213.7.1"]


def test_a_namespace_of_somebody_elses_is_never_touched(host: HostNetwork, tmp_path: Path) -> None:
    name = f"{MARK}-ns"
    ip("netns", "add", name)
    try:
        with pytest.raises(ConfigError, match=r"network.namespace: .*: there is one already"):
            host.make(tap(address=_ADDRESS, namespace=name), _MAC)
        host.remove()
        assert namespaces() == [name]
        # One that took the name of ours has another number. Or we did not come to note the number, and it is in use.
        ip("-n", name, "link", "add", "theirs", "type", "bridge")
        boot = host_network._boot()
        for inode in (1, None):
            record = {"link": "hva00000000", "namespace": name, "inode": inode, "boot": boot}
            (tmp_path / RECORD).write_text(json.dumps(record))
            HostNetwork(_NAME, tmp_path).remove()
            assert namespaces() == [name]
        # The number is right, and the host has been started since.
        number = (NAMESPACES / name).stat().st_ino
        (tmp_path / RECORD).write_text(json.dumps(record | {"inode": number, "boot": "another"}))
        HostNetwork(_NAME, tmp_path).remove()
        assert namespaces() == [name]
    finally:
        ip("netns", "del", name)


@pytest.mark.parametrize("point", ["make_namespace", "connect", "bring_up", "name_tap"])
def test_what_fails_halfway_leaves_nothing(
    host: HostNetwork, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    def fails(*_arguments: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(links, point, fails)
    with pytest.raises(HostError, match=f"VM {_NAME}: network: Input/output error"):
        host.make(tap(address=_ADDRESS, namespace=f"{MARK}-ns"), _MAC)
    host.remove()
    assert not devices() + namespaces()
    assert not (tmp_path / RECORD).exists()


def test_a_network_the_host_has_is_refused(host: HostNetwork) -> None:
    with a_bridge(f"{MARK}b", "10.213.0.1/16") as bridge:
        said = f"network.address: {_ADDRESS}: the host reaches 10.213.0.0/16 by {bridge}"
        with pytest.raises(ConfigError, match=said):
            host.make(tap(address=_ADDRESS), _MAC)
        host.handed_over()
    for name, said in (("nosuchbridge", "there is no such bridge"), ("lo", "is a network device, but no bridge")):
        with pytest.raises(ConfigError, match=f"network.bridge: {name}: {said}"):
            host.make(tap(bridge=name), _MAC)
        host.handed_over()


async def test_a_start_that_is_cancelled_leaves_nothing(
    host: HostNetwork, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its thread goes on; what it makes is removed once it is done."""
    come, go_on, connect = threading.Event(), threading.Event(), links.connect

    def slowly(*arguments: str) -> None:
        come.set()
        assert go_on.wait(30)
        connect(*arguments)

    monkeypatch.setattr(links, "connect", slowly)
    config = VmConfig(name=_NAME, memory=128 * MiB, network=tap(address=_ADDRESS, namespace=f"{MARK}-ns"))
    making = asyncio.create_task(vm_network.make(host, config))
    assert await asyncio.to_thread(come.wait, 30)
    making.cancel()
    with pytest.raises(asyncio.CancelledError):
        await making
    removing = asyncio.create_task(vm_network.remove_made(host))
    await asyncio.sleep(0)
    removing.cancel()
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await removing
    assert not devices() + namespaces()
    # Whoever comes later makes nothing any more.
    with pytest.raises(HostError, match="its start was given up"):
        await vm_network.make(host, config)


async def test_children_that_end_end_nobody_else(host: HostNetwork) -> None:
    """pyroute2 ends its children by SIGTERM; a host agent must not take that for its own."""
    told: list[int] = []
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, lambda: told.append(os.getpid()))
    try:
        for _ in range(10):
            made = await asyncio.to_thread(host.make, tap(address=_ADDRESS, namespace=f"{MARK}-ns"), _MAC)
            assert made.inode
            host.handed_over()
            await asyncio.to_thread(HostNetwork(_NAME, host._path.parent).remove)
        await asyncio.sleep(0.1)
    finally:
        loop.remove_signal_handler(signal.SIGTERM)
    assert told == []
