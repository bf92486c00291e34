"""A VM's network: what may be written of it, and what QEMU and the guest's kernel are told."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvaqemu.config import VmConfig, load_vm
from hvaqemu.errors import ConfigError
from hvaqemu.network_config import Forward, parse_forward, service_address
from hvaqemu.qemu.command import LaunchFiles, LaunchSockets, build_command
from hvaqemu.qemu.network import mac_of

_VM = "name: one\nmemory: 512M\n"
_FILES = LaunchFiles(
    kernel=Path("/i/kernel"),
    initrd=Path("/i/initrd"),
    kernel_args="rw",
    golden=Path("/i/root.raw"),
    overlay=Path("/v/root.qcow2"),
    console_log=Path("/r/console.log"),
)


def vm(folder: Path, network: str, more: str = "") -> VmConfig:
    path = folder / "vm.yaml"
    path.write_text(f"{_VM}network: {network}\n{more}" if network else f"{_VM}{more}")
    return load_vm(path)


def complaint(folder: Path, network: str) -> str:
    with pytest.raises(ConfigError) as caught:
        vm(folder, network)
    return str(caught.value).removeprefix(f"{folder}/vm.yaml:3: key ")


def command(config: VmConfig) -> list[str]:
    return build_command(config.profile, config, _FILES, LaunchSockets(7, 8, 9))


def after(argv: list[str], option: str) -> list[str]:
    return [argv[index + 1] for index, word in enumerate(argv) if word == option]


def nics(argv: list[str]) -> list[str]:
    return [device for device in after(argv, "-device") if "virtio-net" in device]


def test_none_is_no_device(tmp_path: Path) -> None:
    for network in ("none", "{type: none}"):
        argv = command(vm(tmp_path, network))
        assert (after(argv, "-netdev"), nics(argv), after(argv, "-append")) == ([], [], ["rw"])


def test_user_is_the_default_and_needs_nothing_of_the_host(tmp_path: Path) -> None:
    config = vm(tmp_path, "")
    assert config == vm(tmp_path, "user") == vm(tmp_path, "{type: user}")
    argv = command(config)
    assert after(argv, "-netdev") == [
        "user,id=net0,ipv6=off,net=10.0.2.0/24,host=10.0.2.2,dns=10.0.2.3,dhcpstart=10.0.2.15"
    ]
    assert nics(argv) == [f'{{"driver":"virtio-net-ccw","id":"nic0","netdev":"net0","mac":"{mac_of(config)}"}}']
    assert after(argv, "-append") == ["rw ip=10.0.2.15::10.0.2.2:255.255.255.0:one:eth0:off:10.0.2.3"]


def test_an_isolated_user_network_has_no_way_out(tmp_path: Path) -> None:
    argv = command(vm(tmp_path, "{type: user, isolated: true, forward: ['8080:80', '0.0.0.0:53:5353/udp']}"))
    (netdev,) = after(argv, "-netdev")
    assert netdev.endswith(",restrict=on,hostfwd=tcp:127.0.0.1:8080-:80,hostfwd=udp:0.0.0.0:53-:5353")
    assert after(argv, "-append") == ["rw ip=10.0.2.15:::255.255.255.0:one:eth0:off"]


def test_tap(tmp_path: Path) -> None:
    argv = command(vm(tmp_path, "{type: tap, address: 10.77.0.9/24, mac: '52:54:00:AA:00:01'}"))
    # Never vhost, and no program that QEMU would have to start: the descriptor is ours.
    assert after(argv, "-netdev") == ["tap,id=net0,fd=9,vhost=off"]
    assert '"mac":"52:54:00:aa:00:01"' in nics(argv)[0]
    assert after(argv, "-append") == ["rw ip=10.77.0.9::10.77.0.1:255.255.255.0:one:eth0:off"]


@pytest.mark.parametrize(
    ("network", "word"),
    [
        ("{type: tap, bridge: br0}", "ip=::::one:eth0:dhcp"),
        ("{type: tap, bridge: br0, address: 10.1.2.3/16}", "ip=10.1.2.3:::255.255.0.0:one:eth0:off"),
        (
            "{type: tap, bridge: br0, address: 10.1.2.3/16, gateway: 10.1.0.1}",
            "ip=10.1.2.3::10.1.0.1:255.255.0.0:one:eth0:off",
        ),
        # The first address of the network is the guest's own.
        ("{type: tap, address: 10.77.0.1/30}", "ip=10.77.0.1::10.77.0.2:255.255.255.252:one:eth0:off"),
        (
            "{type: tap, namespace: mine, address: 10.77.0.2/24, host_address: 10.77.0.9}",
            "ip=10.77.0.2::10.77.0.9:255.255.255.0:one:eth0:off",
        ),
    ],
)
def test_the_guest_is_told(tmp_path: Path, network: str, word: str) -> None:
    assert after(command(vm(tmp_path, network)), "-append") == [f"rw {word}"]


def test_a_users_own_word_is_left_alone(tmp_path: Path) -> None:
    argv = command(vm(tmp_path, "user", "kernel_args: ip=dhcp\n"))
    assert after(argv, "-append") == ["rw ip=dhcp"]


def test_a_name_keeps_its_hardware_address(tmp_path: Path) -> None:
    one = vm(tmp_path, "user")
    assert mac_of(one) == mac_of(one)
    assert mac_of(one) != mac_of(one.model_copy(update={"name": "two"}))
    assert mac_of(one).startswith("52:54:00:")


@pytest.mark.parametrize(
    ("network", "said"),
    [
        ("bridged", "network: write none, user, or keys of its own, one of them type: none, user, tap"),
        ("{bridge: br0}", "network: write none, user, or keys of its own, one of them type: none, user, tap"),
        ("{type: [tap]}", "network: write none, user, or keys of its own, one of them type: none, user, tap"),
        ("tap", "network: tap needs keys: write {type: tap, bridge: NAME} or {type: tap, address: 10.77.0.2/24}"),
        ("{type: none, mac: x}", "network.mac: is not a known key"),
        ("{type: user, bridge: br0}", "network.bridge: is not a known key"),
        ("{type: tap}", "network: needs address, the guest's own, for example 10.77.0.2/24"),
        ("{type: tap, namespace: a}", "network: needs address, the guest's own, for example 10.77.0.2/24"),
        (
            "{type: tap, bridge: a, namespace: b}",
            "network.namespace: means a network of the VM's own; it can not be given with bridge",
        ),
        (
            "{type: tap, bridge: a, address: 10.0.0.2/24, host_address: 10.0.0.1}",
            "network.host_address: can not be given with bridge: its addresses are left as they are",
        ),
        (
            "{type: tap, bridge: a, gateway: 10.0.0.1}",
            "network.gateway: needs address; by DHCP the guest is told both",
        ),
        (
            "{type: tap, bridge: abcdefghijklmnop}",
            "network.bridge: the kernel's names of devices have at most 15 letters",
        ),
        (
            "{type: tap, namespace: ../x, address: 10.0.0.2/24}",
            "network.namespace: must be 1 to 63 letters, digits, '.', '_' or '-', and begin with a letter or digit",
        ),
        (
            "{type: tap, address: 10.0.0.2}",
            "network.address: write an IPv4 address and the length of its network, for example 10.77.0.2/24",
        ),
        (
            "{type: tap, address: 127.0.0.2/8}",
            "network.address: 127.0.0.2 is no address that a network device may have",
        ),
        ("{type: tap, address: 10.0.0.2/31}", "network.address: the length of the network must be between 8 and 30"),
        (
            "{type: tap, address: 10.0.0.255/24}",
            "network.address: 10.0.0.255 is the network itself or its broadcast address, and no host",
        ),
        (
            "{type: tap, address: 10.0.0.2/24, gateway: 10.0.1.1}",
            "network.gateway: 10.0.1.1 is no host of the guest's network, 10.0.0.0/24",
        ),
        (
            "{type: tap, address: 10.0.0.2/24, host_address: 10.0.0.2}",
            "network.host_address: 10.0.0.2 is the guest's own address",
        ),
        (
            "{type: tap, address: 10.0.0.2/24, gateway: here}",
            "network.gateway: write an IPv4 address, for example 10.77.0.1",
        ),
        (
            "{type: user, mac: '01:00:5e:00:00:01'}",
            "network.mac: must be the address of one device, as 52:54:00:12:34:56",
        ),
        (
            "{type: user, forward: ['80']}",
            "network.forward[0]: write [ADDRESS:]HOST_PORT:GUEST_PORT[/udp], for example 127.0.0.1:8080:80",
        ),
        (
            "{type: user, forward: ['8080:80', '127.0.0.1:8080:81']}",
            "network.forward[1]: port 8080 of 127.0.0.1 is forward[0]'s already",
        ),
        ("{type: user, forward: ['0:80']}", "network.forward[0]: ports are between 1 and 65535"),
        ("{type: user, forward: ['1.2.3:8080:80']}", "network.forward[0]: 1.2.3 is not an IPv4 address"),
    ],
)
def test_what_is_wrong_is_one_line(tmp_path: Path, network: str, said: str) -> None:
    assert complaint(tmp_path, network) == said


forwards = st.builds(
    Forward, st.sampled_from(["tcp", "udp"]), st.ip_addresses(v=4), st.integers(1, 65535), st.integers(1, 65535)
)


@given(forwards)
def test_a_forward_is_read_as_it_is_written(forward: Forward) -> None:
    assert parse_forward(str(forward)) == forward


def test_a_config_survives_json(tmp_path: Path) -> None:
    for network in ("none", "{type: user, forward: ['80:80']}", "{type: tap, namespace: n, address: 10.0.0.2/24}"):
        config = vm(tmp_path, network)
        assert VmConfig.model_validate_json(config.model_dump_json()) == config


def test_where_a_service_is_reached(tmp_path: Path) -> None:
    tap = vm(tmp_path, "{type: tap, address: 10.77.0.2/24}").network
    assert service_address(tap, 80) == ("10.77.0.2", 80)
    user = vm(tmp_path, "{type: user, forward: ['0.0.0.0:8080:80', '53:53/udp']}").network
    assert service_address(user, 80) == ("127.0.0.1", 8080)
    for network, port, said in (
        (user, 53, "port 53 of the guest is not forwarded"),
        (vm(tmp_path, "none").network, 80, "the VM has no network"),
        (vm(tmp_path, "{type: tap, bridge: b}").network, 80, "is not known beforehand"),
    ):
        with pytest.raises(ValueError, match=said):
            service_address(network, port)
