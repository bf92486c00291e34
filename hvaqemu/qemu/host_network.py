"""What is made on the host for a VM's tap network, and how it goes again.

A tap device is not persistent: it goes with the last descriptor, which is QEMU's, whoever kills whom. A network
namespace and the link into it stay until they are deleted, so they are recorded before they are made. What is found
that was not made by us (a user's bridge, a namespace of the same name) is left as it is.

Everything here blocks, for some 0.1 s, and may fork: not for an event loop's thread.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from hvaqemu.errors import ConfigError, HostError
from hvaqemu.faultpoints import reach
from hvaqemu.network_config import TapNetwork

RECORD = "network.json"
#: Where iproute2 and pyroute2 keep the names of namespaces.
NAMESPACES = Path("/var/run/netns")
#: Names of the devices we make begin with it; the rest is drawn by lot.
PREFIX = "hva"

_TUN = Path("/dev/net/tun")
#: include/uapi/linux/if_tun.h
_TUNSETIFF = 0x400454CA
_IFF_TAP, _IFF_NO_PI, _IFF_VNET_HDR = 0x0002, 0x1000, 0x4000

_HINT = "be root, or have CAP_NET_ADMIN (for a namespace CAP_SYS_ADMIN too); or write network: user"


class MadeNetwork(BaseModel):
    """What was made on the host for a VM, or is about to be."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    #: A device in the host's own namespace: the tap, or the host's end of the link into the VM's namespace.
    link: str
    namespace: str = ""
    #: Of the namespace, once it is made.
    inode: int | None = None
    #: The host's boot in which that was: the next one gives the same numbers to others.
    boot: str = ""


class HostNetwork:
    """The host's side of one VM's network.

    :param name: the VM's, for errors and for who looks at the devices.
    :param folder: the VM's runtime directory.
    """

    def __init__(self, name: str, folder: Path) -> None:
        self._name = name
        self._path = folder / RECORD
        self._tap = -1
        self._over = False
        # Whoever was cancelled while a thread makes a network removes it once that thread is done.
        self._lock = threading.Lock()

    @property
    def tap(self) -> int:
        """The descriptor of the tap device, for QEMU."""
        return self._tap

    def make(self, network: TapNetwork, mac: str) -> MadeNetwork:
        """Make what ``network`` needs.

        :param mac: the guest's.
        :raise ConfigError: it does not go with what this host has.
        :raise HostError: it can not be made here.
            :meth:`remove` takes away what there is of it.
        """
        with self._lock, self._told():
            if self._over:
                raise HostError(f"VM {self._name}: its start was given up")
            tap = new_name()
            # First, so that who may not do any of this leaves nothing behind.
            self._tap = open_tap(tap)

            from hvaqemu.qemu import links

            with links.errors():
                links.name_tap(tap, mac, self._alias)
                if network.bridge is not None:
                    links.join(tap, network.bridge, self._where("bridge", network.bridge))
                    return MadeNetwork(link=tap)
                assert network.host is not None
                links.refuse_overlap(network.host.network, self._where("address", str(network.address)))
                made = MadeNetwork(link=tap)
                if network.namespace is not None:
                    made = self._make_namespace(network.namespace)
                    links.connect(network.namespace, tap, made.link, self._alias)
                links.bring_up(made.link, network.host)
                reach("agent.network.made")
                return made

    def handed_over(self) -> None:
        """QEMU has the tap device, which goes with it."""
        tap, self._tap = self._tap, -1
        if tap >= 0:
            os.close(tap)

    def remove(self) -> None:
        """Remove what was made, if anything was, now or by an earlier host agent. QEMU must have ended.

        :raise HostError: it can not be removed, or the record can not be read; it may be tried again.
        """
        with self._lock, self._told():
            self._over = True
            self.handed_over()
            if (made := self._recorded()) is None:
                return
            if made.boot == _boot():
                from hvaqemu.qemu import links

                with links.errors():
                    links.delete(made.link)
                    _remove_namespace(made)
            self._path.unlink(missing_ok=True)

    def _make_namespace(self, name: str) -> MadeNetwork:
        from hvaqemu.qemu import links

        if os.path.lexists(NAMESPACES / name):
            hint = "it is made for the VM and deleted with it; choose another name"
            raise ConfigError(f"{self._where('namespace', name)}: there is one already", hint)
        made = MadeNetwork(link=new_name(), namespace=name, boot=_boot())
        self._record(made)
        reach("agent.network.recorded")
        links.make_namespace(name)
        reach("agent.network.namespace")
        made = made.model_copy(update={"inode": (NAMESPACES / name).stat().st_ino})
        self._record(made)
        return made

    def _record(self, made: MadeNetwork) -> None:
        scratch = self._path.with_suffix(".new")
        scratch.touch(mode=0o600)
        scratch.write_text(made.model_dump_json())
        scratch.replace(self._path)

    def _recorded(self) -> MadeNetwork | None:
        try:
            return MadeNetwork.model_validate_json(self._path.read_bytes())
        except FileNotFoundError:
            return None
        except ValidationError as error:
            raise HostError(f"{self._path}: not a record of this version of hvaqemu") from error

    @property
    def _alias(self) -> str:
        return f"hvaqemu {self._name}"

    def _where(self, key: str, value: str) -> str:
        return f"VM {self._name}: network.{key}: {value}"

    @contextmanager
    def _told(self) -> Iterator[None]:
        """What the kernel says, as one line."""
        try:
            yield
        except OSError as error:
            what = f"{error.filename}: " if error.filename else ""
            hint = _HINT if error.errno in (errno.EPERM, errno.EACCES) else ""
            raise HostError(f"VM {self._name}: network: {what}{error.strerror or error}", hint) from error


def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def new_name() -> str:
    """A name for a device, which nothing on this host has."""
    return f"{PREFIX}{secrets.token_hex(4)}"


def open_tap(name: str) -> int:
    """A new tap device; it goes with the descriptor.

    :raise OSError: not allowed, no such driver, or the name is taken.
    """
    descriptor = os.open(_TUN, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        flags = _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR
        fcntl.ioctl(descriptor, _TUNSETIFF, struct.pack("16sH22x", name.encode(), flags))
    except OSError as error:
        os.close(descriptor)
        raise OSError(error.errno, error.strerror, str(_TUN)) from error
    return descriptor


def _remove_namespace(made: MadeNetwork) -> None:
    from hvaqemu.qemu import links

    path = NAMESPACES / made.namespace
    try:
        status, around = path.stat(), NAMESPACES.stat()
    except FileNotFoundError:
        return
    if status.st_dev == around.st_dev:
        # We died before there was a namespace to go with the name.
        if made.inode is None and status.st_size == 0:
            with suppress(FileNotFoundError):
                path.unlink()
    elif status.st_ino == made.inode or (made.inode is None and links.is_empty(made.namespace)):
        # Empty: we may have died between making it and noting which it is.
        links.remove_namespace(made.namespace)
