"""What QEMU, and by its command line the guest's kernel, is told of the VM's network. Nothing is made here."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from hvaqemu.config import VmConfig
from hvaqemu.network_config import USER_ADDRESS, USER_GATEWAY, USER_NAME_SERVER, NoNetwork, TapNetwork, UserNetwork

#: Names of parts inside QEMU, for QMP.
NETDEV_ID = "net0"
NIC_ID = "nic0"

#: The locally administered prefix that QEMU's own defaults have.
_PREFIX = "52:54:00"
_MACHINE_ID = Path("/etc/machine-id")


def mac_of(config: VmConfig) -> str:
    """The guest's hardware address: what its file says, else one that stays the same for this name on this host."""
    network = config.network
    if not isinstance(network, NoNetwork) and network.mac is not None:
        return network.mac
    try:
        host = _MACHINE_ID.read_text().strip()
    except OSError:
        host = ""
    digest = hashlib.sha256(f"{host} {config.name}".encode()).digest()
    return ":".join((_PREFIX, *(f"{byte:02x}" for byte in digest[:3])))


def netdev(config: VmConfig, tap: int | None) -> list[str]:
    """QEMU's arguments for the host's side.

    :param tap: the descriptor of the tap device, where there is one.
    """
    network = config.network
    if isinstance(network, UserNetwork):
        # Without IPv6, of which the guest is told nothing, QEMU has no timer for it either.
        options = [f"user,id={NETDEV_ID},ipv6=off,net={USER_ADDRESS.network},host={USER_GATEWAY}"]
        options += [f"dns={USER_NAME_SERVER},dhcpstart={USER_ADDRESS.ip}"]
        options += ["restrict=on"] if network.isolated else []
        options += [f"hostfwd={each.protocol}:{each.address}:{each.host}-:{each.guest}" for each in network.forwards]
        return ["-netdev", ",".join(options)]
    if isinstance(network, TapNetwork):
        # Kernel vhost would write guest RAM past QEMU.
        return ["-netdev", f"tap,id={NETDEV_ID},fd={tap},vhost=off"]
    return []


def nic(suffix: str, config: VmConfig) -> Iterator[dict[str, object]]:
    """The guest's device, if it has one."""
    if not isinstance(config.network, NoNetwork):
        yield {"driver": f"virtio-net{suffix}", "id": NIC_ID, "netdev": NETDEV_ID, "mac": mac_of(config)}


def kernel_word(config: VmConfig) -> str:
    """``ip=CLIENT:SERVER:GATEWAY:NETMASK:HOSTNAME:DEVICE:HOW:DNS``, which kernels and many an initramfs understand
    (Documentation/admin-guide/nfs/nfsroot.rst); "" without a network, or where the user's kernel_args have their own.
    """
    network = config.network
    if isinstance(network, NoNetwork) or any(word.startswith("ip=") for word in config.kernel_args.split()):
        return ""
    if isinstance(network, UserNetwork):
        address, gateway, dns = USER_ADDRESS, str(USER_GATEWAY), f":{USER_NAME_SERVER}"
        if network.isolated:
            gateway, dns = "", ""
    elif network.address is None:
        return f"ip=::::{config.name}:eth0:dhcp"
    else:
        address, dns = network.address, ""
        gateway = str(network.gateway or (network.host.ip if network.host is not None else ""))
    return f"ip={address.ip}::{gateway}:{address.netmask}:{config.name}:eth0:off{dns}"
