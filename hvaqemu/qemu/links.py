"""Devices, bridges, addresses and namespaces of the host, by netlink. Everything here blocks, and some of it forks.

Slow to import: only a VM with a tap network needs it.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import IPv4Interface, IPv4Network
from socket import AF_INET
from typing import Any

import pyroute2
from pyroute2.netlink.exceptions import NetlinkError

from hvaqemu.errors import ConfigError
from hvaqemu.faultpoints import reach

#: Inside a namespace of a VM's own.
_BRIDGE, _UPLINK, _TAP = "bridge0", "uplink", "tap0"
#: RT_TABLE_MAIN
_MAIN = 254

# pyroute2 works in a namespace by a child, which it forks. Its default leaves our signal handlers in there, and
# asyncio's would tell us that *we* were told to end when pyroute2 ends its child.
pyroute2.config.disable_mp_signal = True


@contextmanager
def errors() -> Iterator[None]:
    """Everything that goes wrong inside is an OSError."""
    try:
        yield
    except NetlinkError as error:
        raise OSError(error.code, os.strerror(error.code)) from error
    except (RuntimeError, TypeError, struct.error) as error:
        # What pyroute2 makes of a child that died.
        raise OSError(errno.ECHILD, str(error)) from error


def name_tap(tap: str, mac: str, alias: str) -> None:
    """Say whose a new tap device is, and give it an address.

    :param mac: the guest's. A bridge takes the lowest address of its ports for its own, and must not take this one's,
        so it begins with the highest prefix; libvirt does the same.
    """
    with pyroute2.IPRoute() as host:
        host.link("set", index=_index(host, tap), address=f"fe{mac[2:]}", ifalias=alias)


def join(tap: str, name: str, where: str) -> None:
    """Plug a tap device into a bridge, which keeps its own address and MTU.

    :param where: what errors call the bridge.
    :raise ConfigError: there is no such bridge.
    """
    with pyroute2.IPRoute() as host:
        found = [each for each in host.get_links() if each.get_attr("IFLA_IFNAME") == name]
        if not found:
            raise ConfigError(f"{where}: there is no such bridge", f"as root: ip link add {name} type bridge")
        bridge = found[0]
        if bridge.get_nested("IFLA_LINKINFO", "IFLA_INFO_KIND") != "bridge":
            raise ConfigError(f"{where}: is a network device, but no bridge")
        index = _index(host, tap)
        host.link("set", index=index, mtu=bridge.get_attr("IFLA_MTU"), master=bridge["index"])
        host.link("set", index=index, state="up")


def refuse_overlap(wanted: IPv4Network, where: str) -> None:
    """
    :param where: what errors call the network.
    :raise ConfigError: the host reaches others by addresses of ``wanted``.
    """
    with pyroute2.IPRoute() as host:
        names = {link["index"]: link.get_attr("IFLA_IFNAME") for link in host.get_links()}
        for route in host.get_routes(family=AF_INET, table=_MAIN):
            target = route.get_attr("RTA_DST")
            if target is None:
                continue
            network = IPv4Network(f"{target}/{route['dst_len']}")
            if network.overlaps(wanted):
                by = names.get(route.get_attr("RTA_OIF"), "another way")
                raise ConfigError(f"{where}: the host reaches {network} by {by}", "choose another network")


def bring_up(link: str, address: IPv4Interface) -> None:
    """The host's end of the guest's network gets its address, and by that the host a way to the guest."""
    with pyroute2.IPRoute() as host:
        index = _index(host, link)
        host.addr("add", index=index, address=str(address.ip), prefixlen=address.network.prefixlen)
        host.link("set", index=index, state="up")


def make_namespace(name: str) -> None:
    """Make an empty network namespace of that name, which must not be there."""
    pyroute2.netns.create(name)


def remove_namespace(name: str) -> None:
    """Take the name of a namespace away; it goes with the last process in it."""
    pyroute2.netns.remove(name)


def is_empty(namespace: str) -> bool:
    """Whether a namespace has no device but the loopback, which every one has."""
    # Not flags=O_CREAT, the default: what somebody deletes meanwhile is not to be made anew.
    with pyroute2.IPRoute(netns=namespace, flags=0) as inside:
        return [link.get_attr("IFLA_IFNAME") for link in inside.get_links()] == ["lo"]


def connect(namespace: str, tap: str, link: str, alias: str) -> None:
    """Move a tap device into a namespace and join it there, by a bridge, to a link whose end here is ``link``."""
    with pyroute2.IPRoute() as host:
        host.link("add", ifname=link, kind="veth", peer={"ifname": _UPLINK, "net_ns_fd": namespace})
        reach("agent.network.link")
        host.link("set", index=_index(host, link), ifalias=alias)
        host.link("set", index=_index(host, tap), net_ns_fd=namespace, ifname=_TAP)
    with pyroute2.IPRoute(netns=namespace, flags=0) as inside:
        inside.link("add", ifname=_BRIDGE, kind="bridge")
        bridge = _index(inside, _BRIDGE)
        for port in (_UPLINK, _TAP):
            inside.link("set", index=_index(inside, port), master=bridge, state="up")
        for device in (bridge, _index(inside, "lo")):
            inside.link("set", index=device, state="up")


def delete(link: str) -> None:
    """Delete a device, if it is there."""
    with pyroute2.IPRoute() as host:
        for index in host.link_lookup(ifname=link):
            host.link("del", index=index)


def _index(where: Any, name: str) -> int:
    """:raise OSError: somebody has deleted the device."""
    found = where.link_lookup(ifname=name)
    if not found:
        raise OSError(errno.ENODEV, os.strerror(errno.ENODEV), name)
    return int(found[0])
