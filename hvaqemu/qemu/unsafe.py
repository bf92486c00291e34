"""What in a QEMU would make discarding unsafe, or end it, by its names: devices, objects, back ends, properties.

Pure tables, and questions to them that answer with a reason or "". Whoever hears of such a thing asks here: from a
user's arguments, from a monitor command, or from a QEMU that runs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

_SHARES = "another process writes guest RAM, and its writes are not seen"
_PINS = "it pins guest RAM, and writes past its write protection"
_ONE_RAM = "the guest's RAM is the one memory back end that hvaqemu gives it"
_SETS_RAM = "it plugs and unplugs guest RAM on its own"
_SEALED = "the host can not read what such a guest holds"
_DIRECT = "direct I/O pins guest pages and writes past their write protection"
_SPAWNS = "QEMU may start no programs"
_DISCARDS = "free page reporting discards pages on its own"

#: QOM types, as devices and objects are called, from their beginning.
_TYPES = {
    re.compile(kind): reason
    for kind, reason in {
        r"vhost-user-.*|cryptodev-vhost-user.*": _SHARES,
        r"vhost-vdpa.*": _PINS,
        r"vhost-.*": "kernel vhost writes guest RAM past QEMU",
        r"vfio-(?!user).*|vfio": _PINS,
        r"vfio-user.*|x-vfio-user.*|x-remote.*|x-pci-proxy.*": _SHARES,
        r"ivshmem.*": _ONE_RAM,
        r"virtio-mem(-.*)?|hv-balloon": _SETS_RAM,
        r"virtio-pmem.*|pc-dimm|nvdimm|cxl-.*": _ONE_RAM,
        r"memory-backend.*": _ONE_RAM,
        r"iommufd": _PINS,
        # SCSI commands are handed to the host's device with the guest's buffers (QEMU, hw/scsi/scsi-disk.c).
        r"scsi-block|scsi-generic": _DIRECT,
        r"sev-.*|sev|tdx-guest|s390-pv-guest|pef-guest": _SEALED,
    }.items()
}
#: Block drivers that reach their device past the page cache whatever they are told.
_BLOCK_DRIVERS = re.compile(r"nvme|nvme-io_uring|virtio-blk-.*|blkio|vfio.*")
_NET_DRIVERS = {"vhost-user": _SHARES, "vhost-vdpa": _PINS}
#: Properties that must not be on (or, where a value is named, not have it).
_SWITCHES = {
    "free-page-reporting": _DISCARDS,
    "vhost": "kernel vhost writes guest RAM past QEMU",
    "vhostforce": "kernel vhost writes guest RAM past QEMU",
    "direct": _DIRECT,
    "blob": "udmabuf pins guest RAM",
    "mem-lock": "it keeps the guest's memory from being given back",
    "x-postcopy-ram": "postcopy needs a userfaultfd of its own on the guest's RAM",
    "x-background-snapshot": "it needs a userfaultfd of its own on the guest's RAM",
    "x-colo": "it keeps a second copy of the guest's RAM",
}
_VALUES = {("cache", "none"): _DIRECT, ("cache", "directsync"): _DIRECT}
#: Properties that must not be there at all.
_GIVEN = {
    "vhostfd": "kernel vhost writes guest RAM past QEMU",
    "vhostfds": "kernel vhost writes guest RAM past QEMU",
    "memory-backend": _ONE_RAM,
    "memory-encryption": _SEALED,
    "confidential-guest-support": _SEALED,
    "maxmem": _ONE_RAM,
}
_OFF = ("off", "no", "false", "n", "0")

#: Migration capabilities that need what the pager holds already, or more RAM.
CAPABILITIES = {
    "postcopy-ram": "postcopy needs a userfaultfd of its own on the guest's RAM, and the pager holds the only one",
    "background-snapshot": "it needs a userfaultfd of its own on the guest's RAM, and the pager holds the only one",
    "x-colo": "it keeps a second copy of the guest's RAM",
}

Properties = Mapping[str, str]


def flat(value: Mapping[str, object], prefix: str = "") -> dict[str, str]:
    """JSON's nested members as QEMU's dotted keys, values as their text ("on" and "off" for booleans)."""
    found: dict[str, str] = {}
    for key, member in _members(value):
        if isinstance(member, Mapping | list):
            found |= flat(dict(_members(member)), f"{prefix}{key}.")
        else:
            found[prefix + key] = ("on" if member else "off") if isinstance(member, bool) else str(member)
    return found


def _members(value: object) -> Iterator[tuple[str, object]]:
    pairs = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    return ((str(key), member) for key, member in pairs)


def kind(name: str) -> str:
    """Why a device or object of this QOM type is not possible, or ""."""
    return next((f"{name}: {reason}" for pattern, reason in _TYPES.items() if pattern.fullmatch(name)), "")


def switches(properties: Properties) -> str:
    """Why these properties (dotted keys) are not possible, or ""."""
    for key, value in properties.items():
        name = key.rpartition(".")[2].replace("_", "-")
        if name in _GIVEN:
            return f"{key}: {_GIVEN[name]}"
        if name in _SWITCHES and value.lower() not in _OFF:
            return f"{key}={value}: {_SWITCHES[name]}"
        if reason := _VALUES.get((name, value)):
            return f"{key}={value}: {reason}"
    return ""


def device(properties: Properties) -> str:
    """Why a device (its type is ``driver``) is not possible, or ""."""
    return kind(properties.get("driver", "")) or switches(properties)


def made_object(properties: Properties) -> str:
    """Why an object (its type is ``qom-type``) is not possible, or ""."""
    return kind(properties.get("qom-type", "")) or switches(properties)


def network_kind(name: str) -> str:
    """Why a network back end of this kind is not possible, or ""."""
    return f"{name}: {_NET_DRIVERS[name]}" if name in _NET_DRIVERS else ""


def network(properties: Properties) -> str:
    """Why a network back end (its kind is ``type``) is not possible, or ""."""
    kind_of = properties.get("type", "")
    if reason := network_kind(kind_of) or switches(properties):
        return reason
    # A program that QEMU starts would not be forgiven by its sandbox (spawn=deny): QEMU ends by SIGSYS (seen).
    given = {"fd", "fds"} & properties.keys()
    if kind_of == "tap" and not given and {properties.get("script"), properties.get("downscript")} != {"no"}:
        return f"tap: {_SPAWNS}; add script=no,downscript=no"
    if kind_of == "bridge" or {"helper", "smb"} & properties.keys():
        return f"{kind_of}: {_SPAWNS}; make a tap device beforehand"
    return f"guestfwd: {_SPAWNS}" if "cmd:" in properties.get("guestfwd", "") else ""


def block(properties: Properties) -> str:
    """Why an open image is not possible, or ""; drivers are the values of all keys that end in ``driver``."""
    for key, value in properties.items():
        name = key.rpartition(".")[2]
        if name == "driver" and _BLOCK_DRIVERS.fullmatch(value):
            return f"{key}={value}: {_DIRECT}"
        if name in ("file", "filename", "backing") and value.startswith(("json:", "nvme:")):
            return f"{key}={value.partition(':')[0]}:…: what it opens can not be told; write it as -blockdev"
    return switches(properties)
