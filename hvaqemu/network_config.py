"""What a user writes about a VM's network: ``none``, ``user``, or keys that begin with ``type``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from ipaddress import AddressValueError, IPv4Address, IPv4Interface
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import AfterValidator, BeforeValidator, ValidatorFunctionWrapHandler, WrapValidator, model_validator

from hvaqemu.fields import Config, Flag, Location, Name, complain

#: QEMU's user network: the guest's address, and where the host and its name server are found (QEMU, net/slirp.c).
USER_ADDRESS = IPv4Interface("10.0.2.15/24")
USER_GATEWAY = IPv4Address("10.0.2.2")
USER_NAME_SERVER = IPv4Address("10.0.2.3")

_MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}")
#: IFNAMSIZ of the kernel, with its NUL.
_DEVICE_NAME_MAX = 15
_FORWARD = re.compile(r"(?:(?P<address>[0-9.]+):)?(?P<host>[0-9]+):(?P<guest>[0-9]+)(?:/(?P<protocol>tcp|udp))?")
_LOOPBACK = IPv4Address("127.0.0.1")


def _mac(value: str) -> str:
    value = value.lower()
    if _MAC.fullmatch(value) is None or int(value[:2], 16) & 1 or value == "00:00:00:00:00:00":
        raise ValueError("must be the address of one device, as 52:54:00:12:34:56")
    return value


def _interface(value: object) -> object:
    if isinstance(value, IPv4Interface):
        return value
    try:
        if not isinstance(value, str) or "/" not in value:
            raise ValueError
        found = IPv4Interface(value)
    except ValueError:
        raise ValueError("write an IPv4 address and the length of its network, for example 10.77.0.2/24") from None
    if not 8 <= found.network.prefixlen <= 30:
        raise ValueError("the length of the network must be between 8 and 30")
    if found.ip.is_loopback or found.ip.is_multicast or found.ip.is_reserved or not found.ip.packed[0]:
        raise ValueError(f"{found.ip} is no address that a network device may have")
    if found.ip in (found.network.network_address, found.network.broadcast_address):
        raise ValueError(f"{found.ip} is the network itself or its broadcast address, and no host")
    return found


def _address(value: object) -> object:
    if isinstance(value, IPv4Address):
        return value
    try:
        if isinstance(value, str):
            return IPv4Address(value)
    except AddressValueError:
        pass
    raise ValueError("write an IPv4 address, for example 10.77.0.1")


def _device_name(value: str) -> str:
    if len(value) > _DEVICE_NAME_MAX:
        raise ValueError(f"the kernel's names of devices have at most {_DEVICE_NAME_MAX} letters")
    return value


class Forward(NamedTuple):
    """A port of the host that leads to one of the guest."""

    protocol: str
    address: IPv4Address
    host: int
    guest: int

    def __str__(self) -> str:
        return f"{self.address}:{self.host}:{self.guest}" + ("/udp" if self.protocol == "udp" else "")


def parse_forward(text: str) -> Forward:
    """A forwarded port as a user writes it: [ADDRESS:]HOST_PORT:GUEST_PORT[/udp].

    Unlike with podman, no address is the loopback's: to be reached by others is asked for by name.

    :raise ValueError: it is something else.
    """
    found = _FORWARD.fullmatch(text)
    if found is None:
        raise ValueError("write [ADDRESS:]HOST_PORT:GUEST_PORT[/udp], for example 127.0.0.1:8080:80")
    try:
        address = IPv4Address(found["address"]) if found["address"] else _LOOPBACK
    except AddressValueError:
        raise ValueError(f"{found['address']} is not an IPv4 address") from None
    ports = int(found["host"]), int(found["guest"])
    if not all(0 < port < 1 << 16 for port in ports):
        raise ValueError("ports are between 1 and 65535")
    return Forward(found["protocol"] or "tcp", address, *ports)


def _forward(value: str) -> str:
    return str(parse_forward(value))


Mac = Annotated[str, AfterValidator(_mac)]
Interface = Annotated[IPv4Interface, BeforeValidator(_interface)]
Address = Annotated[IPv4Address, BeforeValidator(_address)]
DeviceName = Annotated[Name, AfterValidator(_device_name)]


class NoNetwork(Config):
    """No network device."""

    type: Literal["none"] = "none"


class UserNetwork(Config):
    """QEMU's own network: needs no privilege; connections begin in the guest, or at a forwarded port."""

    type: Literal["user"] = "user"
    #: Ports of the host that lead to the guest, as :func:`parse_forward` reads them.
    forward: tuple[Annotated[str, AfterValidator(_forward)], ...] = ()
    #: Nothing but forwarded ports: no connection begins in the guest.
    isolated: Flag = False
    mac: Mac | None = None

    @property
    def forwards(self) -> tuple[Forward, ...]:
        return tuple(map(parse_forward, self.forward))

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        first: dict[tuple[object, ...], int] = {}
        for index, each in enumerate(self.forwards):
            earlier = first.setdefault((each.protocol, each.address, each.host), index)
            if earlier != index:
                complain((("forward", index), f"port {each.host} of {each.address} is forward[{earlier}]'s already"))
        return self


class TapNetwork(Config):
    """A tap device: on a bridge of the user's, in a namespace of the VM's own, or directly between host and guest."""

    type: Literal["tap"]
    #: A bridge that is there; the guest becomes one more of its ports.
    bridge: DeviceName | None = None
    #: A network namespace that is made for the VM, and goes with it.
    namespace: Name | None = None
    #: The guest's; None (only on a bridge): it asks for one by DHCP.
    address: Interface | None = None
    #: The guest's way to the rest of the world. None: the host, or on a bridge, none.
    gateway: Address | None = None
    #: The host's, in the guest's network. None: the first one of the network that is not the guest's.
    host_address: Address | None = None
    mac: Mac | None = None

    @property
    def host(self) -> IPv4Interface | None:
        """The host's address in the guest's network; None: the host's part of it is the user's."""
        if self.bridge is not None or self.address is None:
            return None
        network = self.address.network
        chosen = self.host_address or next(each for each in network.hosts() if each != self.address.ip)
        return IPv4Interface(f"{chosen}/{network.prefixlen}")

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        complain(*self._complaints())
        return self

    def _complaints(self) -> list[tuple[Location, str]]:
        if self.bridge is not None and self.namespace is not None:
            return [(("namespace",), "means a network of the VM's own; it can not be given with bridge")]
        if self.bridge is not None and self.host_address is not None:
            return [(("host_address",), "can not be given with bridge: its addresses are left as they are")]
        if self.address is None:
            if self.bridge is None:
                return [((), "needs address, the guest's own, for example 10.77.0.2/24")]
            return [(("gateway",), "needs address; by DHCP the guest is told both")] if self.gateway else []
        network = self.address.network
        wrong: list[tuple[Location, str]] = []
        for key, given in (("gateway", self.gateway), ("host_address", self.host_address)):
            if given is None:
                continue
            if given not in network or given in (network.network_address, network.broadcast_address):
                wrong.append(((key,), f"{given} is no host of the guest's network, {network}"))
            elif given == self.address.ip:
                wrong.append(((key,), f"{given} is the guest's own address"))
        return wrong


_KINDS: dict[str, type[NoNetwork | UserNetwork | TapNetwork]] = {
    "none": NoNetwork,
    "user": UserNetwork,
    "tap": TapNetwork,
}


def _network(value: Any, _union: ValidatorFunctionWrapHandler) -> NoNetwork | UserNetwork | TapNetwork:
    # Not left to a union: what it says of a wrong key would begin with what the other members make of it.
    if isinstance(value, NoNetwork | UserNetwork | TapNetwork):
        return value
    given = value if isinstance(value, Mapping) else {"type": value}
    kind = given.get("type")
    model = _KINDS.get(kind) if isinstance(kind, str) else None
    if model is None:
        raise ValueError(f"write none, user, or keys of its own, one of them type: {', '.join(_KINDS)}")
    if model is TapNetwork and not isinstance(value, Mapping):
        raise ValueError("tap needs keys: write {type: tap, bridge: NAME} or {type: tap, address: 10.77.0.2/24}")
    return model.model_validate(given)


Network = Annotated[NoNetwork | UserNetwork | TapNetwork, WrapValidator(_network)]


def service_address(network: NoNetwork | UserNetwork | TapNetwork, port: int) -> tuple[str, int]:
    """Where on this host a TCP port of the guest is reached.

    :raise ValueError: nowhere; says why.
    """
    if isinstance(network, UserNetwork):
        for each in network.forwards:
            if each.protocol == "tcp" and each.guest == port:
                return str(_LOOPBACK if each.address.is_unspecified else each.address), each.host
        raise ValueError(f"port {port} of the guest is not forwarded; add it to forward in the VM's network")
    if isinstance(network, NoNetwork):
        raise ValueError("the VM has no network")
    if network.address is None:
        raise ValueError("the guest's address is not known beforehand; give the VM's network an address")
    return str(network.address.ip), port
