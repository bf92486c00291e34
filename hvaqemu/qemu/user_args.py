"""A user's own arguments for QEMU (``qemu_args``): what would be unsafe is refused before anything starts.

A courtesy: it tells at once and by name what would otherwise be found in the QEMU that runs. The table below knows
whether an option takes a value, so that no value passes for an option; an option it does not know is refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence

from hvaqemu.qemu import unsafe

Check = Callable[[str], str]

_OURS = "hvaqemu gives it"
_ONE_RAM = "the guest's RAM is the one memory back end that hvaqemu gives it"
_PROBED = "QEMU would guess the image's format, which the guest can forge; use -blockdev, or extra_disks"

#: Options that are never passed on, and why.
_REFUSED = {
    "daemonize": "a daemon forks away from the userfaultfd; hvaqemu keeps QEMU in the background by itself",
    "machine": "hvaqemu gives it, with the guest's RAM; set machine",
    "M": "hvaqemu gives it, with the guest's RAM; set machine",
    "m": f"{_ONE_RAM}; set memory",
    "mem-path": _ONE_RAM,
    "mem-prealloc": f"{_ONE_RAM}, and filling it beforehand is the opposite of what it is for",
    "numa": _ONE_RAM,
    "smp": f"{_OURS}; set cpus",
    "accel": f"{_OURS}; set accelerator",
    "enable-kvm": "hvaqemu gives the accelerator; set accelerator: kvm",
    "name": f"{_OURS}; set name",
    "S": f"{_OURS}: the guest starts once its pager is attached",
    "preconfig": "the guest starts once its pager is attached",
    "incoming": "a guest that arrives by migration would write its RAM before a pager is attached; migrate away only",
    "loadvm": "the snapshot would be loaded before a pager is attached; use 'hvaqemu qmp NAME snapshot-load'",
    "sandbox": f"{_OURS}, and later ones would loosen it",
    "no-shutdown": "hvaqemu has to see the guest's end",
    "async-teardown": "guest RAM would outlive QEMU",
    "readconfig": "what it would add can not be told; write it as arguments",
    "set": "write the property where the device is given",
    "chroot": "the pager has to find QEMU's files",
    "runas": "the pager has to be QEMU's user",
    "kernel": f"{_OURS}; choose an image",
    "initrd": f"{_OURS}; choose an image",
    "append": f"{_OURS}; set kernel_args",
    "bios": f"{_OURS}; choose an image",
    "help": "QEMU would print and end",
    "h": "QEMU would print and end",
    "version": "QEMU would print and end",
    "dump-vmstate": "QEMU would print and end",
    **dict.fromkeys(("hda", "hdb", "hdc", "hdd", "cdrom", "fda", "fdb", "mtdblock", "sd", "pflash"), _PROBED),
}

#: Options without a value that are passed on.
_FLAGS = frozenset(
    [
        "enable-sync-profile",
        "full-screen",
        "no-fd-bootchk",
        "no-reboot",
        "no-user-config",
        "nodefaults",
        "nographic",
        "only-migratable",
        "portrait",
        "s",
        "singlestep",
        "snapshot",
        "usb",
    ]
)


def _anything(_value: str) -> str:
    return ""


def _device(value: str) -> str:
    return unsafe.device(properties(value, "driver"))


def _object(value: str) -> str:
    return unsafe.made_object(properties(value, "qom-type"))


def _network(value: str) -> str:
    return unsafe.network(properties(value, "type"))


def _blockdev(value: str) -> str:
    return unsafe.block(properties(value, "driver"))


def _drive(value: str) -> str:
    given = properties(value, "file")
    if "file" in given and "format" not in given and "driver" not in given:
        return f"{_PROBED}, or add format="
    return unsafe.block(given)


def _global(value: str) -> str:
    given = properties(value, "")
    if "driver" in given:
        return unsafe.kind(given["driver"]) or unsafe.switches({given.get("property", ""): given.get("value", "")})
    name, _, text = value.partition("=")
    kind, _, member = name.partition(".")
    return unsafe.kind(kind) or unsafe.switches({member: text})


def _action(value: str) -> str:
    for key in properties(value, ""):
        if key in ("panic", "shutdown"):
            return f"{key}: hvaqemu has to see the guest's end"
    return ""


def _switches(value: str) -> str:
    return unsafe.switches(properties(value, ""))


#: Options with a value that are passed on, and what looks at the value.
_VALUES: Mapping[str, Check] = {
    "device": _device,
    "object": _object,
    "netdev": _network,
    "nic": _network,
    "net": _network,
    "blockdev": _blockdev,
    "drive": _drive,
    "global": _global,
    "action": _action,
    "overcommit": _switches,
    **dict.fromkeys(
        [
            "add-fd",
            "audio",
            "audiodev",
            "boot",
            "chardev",
            "compat",
            "cpu",
            "d",
            "D",
            "debugcon",
            "dfilter",
            "display",
            "echr",
            "fsdev",
            "fw_cfg",
            "gdb",
            "icount",
            "iscsi",
            "k",
            "L",
            "mon",
            "monitor",
            "msg",
            "option-rom",
            "parallel",
            "pidfile",
            "plugin",
            "qmp",
            "qmp-pretty",
            "rotate",
            "rtc",
            "seed",
            "serial",
            "smbios",
            "spice",
            "tpmdev",
            "trace",
            "usbdevice",
            "uuid",
            "vga",
            "virtfs",
            "vnc",
            "watchdog-action",
        ],
        _anything,
    ),
}


def check(arguments: Sequence[str]) -> Iterator[tuple[int, str]]:
    """What can not be passed on: the place of each such argument, and why."""
    index = 0
    while index < len(arguments):
        word, here = arguments[index], index
        index += 1
        # QEMU takes one dash or two (softmmu/vl.c, lookup_opt).
        name = word.removeprefix("-").removeprefix("-")
        if not word.startswith("-"):
            yield here, f"{word}: {_PROBED}"
        elif name in _REFUSED:
            yield here, f"{word}: {_REFUSED[name]}"
            # What follows may be its value, or an option: it is looked at once this one is gone.
            return
        elif name in _VALUES:
            if index == len(arguments):
                yield here, f"{word}: needs a value"
            elif why := _VALUES[name](arguments[index]):
                yield index, f"{word} {why}"
            index += 1
        elif name not in _FLAGS:
            yield here, f"{word}: not an option that hvaqemu passes on"
            return


def properties(value: str, implied: str) -> dict[str, str]:
    """The members of an option's value: JSON, or QEMU's ``KEY=VALUE,…`` (util/keyval.c), as dotted keys.

    :param implied: the key of a first member that has none; "": there is no such.
    """
    if value.startswith("{"):
        try:
            given = json.loads(value)
        except ValueError:
            return {}
        return unsafe.flat(given) if isinstance(given, dict) else {}
    found: dict[str, str] = {}
    for number, part in enumerate(_parts(value)):
        key, equals, text = part.partition("=")
        if equals:
            found[key] = text
        elif number == 0 and implied:
            found[implied] = part
        elif key:
            # A bare word is a switch that is on; "noKEY" is KEY that is off (util/qemu-option.c).
            found[key] = "on"
    return found


def _parts(value: str) -> Iterator[str]:
    """The members of a comma list, in which two commas are one that does not part (util/keyval.c)."""
    part = ""
    rest = value
    while rest:
        before, comma, rest = rest.partition(",")
        part += before
        if comma and rest.startswith(","):
            part += ","
            rest = rest[1:]
            continue
        yield part
        part = ""
    if part:
        yield part
