"""QEMU's command line, as a pure function of what is to run.

Whatever a user can name (paths above all) is given where QEMU takes a plain argument or JSON, never inside a comma
list; the one place that has no other form doubles its commas. Sockets are inherited descriptors. Image formats are
always explicit.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hvaqemu.config import Accelerator, BalloonConfig, ExtraDisk, VmConfig
from hvaqemu.qemu import network
from hvaqemu.qemu.profile import MachineProfile
from hvaqemu.units import MiB

#: Names of parts inside QEMU, for QMP.
RAM_ID = "ram0"
BALLOON_ID = "balloon0"
GOLDEN_NODE = "golden"
#: Disks whose files are the VM's own; their first file's node has the same name.
ROOT_NODE = "root"
SWAP_NODE = "swap"
AGENT_PORT = "org.hvaqemu.agent.0"


@dataclass(frozen=True)
class RawDisk:
    """A further disk, as it was found on this host."""

    path: Path
    read_only: bool
    #: A device node, which QEMU opens with another driver than a file.
    block_device: bool = False
    #: Opened past the host's page cache.
    direct: bool = False
    #: It does not change, so that pages may depend on it.
    layer: bool = False


@dataclass(frozen=True)
class LaunchFiles:
    """The files a VM is started with."""

    kernel: Path
    initrd: Path
    #: The kernel's command line without the project's own switches.
    kernel_args: str
    #: QEMU appends what the guest's console prints.
    console_log: Path
    #: The raw image the root disk is based on; never written.
    golden: Path
    #: The qcow2 file that takes the guest's writes.
    overlay: Path
    #: Frozen qcow2 files between the two, bottom first.
    frozen: tuple[Path, ...] = ()
    #: The qcow2 files of the disk that the guest swaps to, bottom first; the last takes its writes. Empty: none.
    swap: tuple[Path, ...] = ()
    extra_disks: tuple[RawDisk, ...] = ()


@dataclass(frozen=True)
class LaunchSockets:
    """What QEMU inherits, by descriptor number: listening unix sockets, and a tap device."""

    qmp: int
    agent: int
    tap: int | None = None


def build_command(profile: MachineProfile, config: VmConfig, files: LaunchFiles, sockets: LaunchSockets) -> list[str]:
    """The arguments to start QEMU with. The machine starts stopped: QMP ``cont`` runs it once a pager is attached."""
    command = [profile.binary, "-name", f"guest={config.name},debug-threads=on"]
    command += ["-no-user-config", "-nodefaults", "-display", "none", "-S"]
    command += ["-machine", f"{profile.machine},memory-backend={RAM_ID}", "-accel", _accelerator(config)]
    command += ["-object", _json(_ram(config)), "-m", f"{config.memory // MiB}M", "-smp", str(config.cpus)]
    command += ["-kernel", str(files.kernel), "-initrd", str(files.initrd), "-append", _kernel_args(config, files)]
    for node in _nodes(files):
        command += ["-blockdev", _json(node)]
    command += ["-chardev", f"socket,id=qmp,fd={sockets.qmp},server=on,wait=off", "-mon", "chardev=qmp,mode=control"]
    command += ["-chardev", f"socket,id=agent,fd={sockets.agent},server=on,wait=off"]
    command += ["-chardev", f"file,id=console,path={_doubled(files.console_log)},append=on"]
    command += ["-object", _json({"qom-type": "rng-builtin", "id": "rng0"})]
    command += network.netdev(config, sockets.tap)
    for device in _devices(profile, config, files):
        command += ["-device", _json(device)]
    # A guest that panicked stays for whoever looks at it; a child of QEMU would be unknown to the pager.
    command += ["-action", "panic=pause"]
    command += ["-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny"]
    return [*command, *config.qemu_args]


def shell_line(command: Sequence[str]) -> str:
    """``command`` as one line a shell understands."""
    return shlex.join(command)


def _json(value: dict[str, object]) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


def _doubled(path: Path) -> str:
    """``path`` inside a comma list (QEMU, util/keyval.c: ',,' is a comma)."""
    return str(path).replace(",", ",,")


def _accelerator(config: VmConfig) -> str:
    if config.accelerator is Accelerator.KVM:
        return "kvm"
    return f"tcg,tb-size={config.translation_mib},thread=multi"


def _kernel_args(config: VmConfig, files: LaunchFiles) -> str:
    switches = (
        "hva.exec=1" if config.allow_exec else "",
        "hva.swap=1" if files.swap else "",
        network.kernel_word(config),
    )
    return " ".join(part for part in (files.kernel_args, config.kernel_args, *switches) if part)


def _ram(config: VmConfig) -> dict[str, object]:
    return {"qom-type": "memory-backend-memfd", "id": RAM_ID, "size": config.memory, "share": True}


def direct_nodes(disks: Sequence[ExtraDisk]) -> frozenset[str]:
    """The nodes of QEMU that do direct I/O for these disks, and may."""
    return frozenset(_direct_node(index) for index, disk in enumerate(disks) if disk.direct)


def _direct_node(index: int) -> str:
    return f"extra{index}-direct"


def _file(path: Path) -> dict[str, object]:
    return {
        "driver": "file",
        "filename": str(path),
        "auto-read-only": False,
        # Through the host's page cache: direct I/O pins guest pages and writes past their write protection.
        "cache": {"direct": False, "no-flush": False},
    }


def overlay_node(path: Path, backing: str | None, *, read_only: bool = False) -> dict[str, object]:
    """The block node of a qcow2 file; its name is the file's, without the suffix.

    :param backing: the node below; None: nothing yet. Named here, so what the file's header says of its backing file
        is never looked at.
    """
    return {
        "driver": "qcow2",
        "node-name": path.stem,
        "read-only": read_only,
        "auto-read-only": False,
        # Whether it may be written is left to the node above: QEMU then closes its writable descriptor when it is
        # frozen, so that the kernel can tell a writer of a layer from nobody.
        "file": _file(path),
        "backing": backing,
    }


def _nodes(files: LaunchFiles) -> list[dict[str, object]]:
    golden: dict[str, object] = {
        "driver": "raw",
        "node-name": GOLDEN_NODE,
        "read-only": True,
        "auto-read-only": False,
        "file": _file(files.golden) | {"read-only": True},
    }
    root = _chain_nodes(GOLDEN_NODE, (*files.frozen, files.overlay))
    swap = _chain_nodes(None, files.swap)
    return [golden, *root, *swap, *(_extra_node(index, disk) for index, disk in enumerate(files.extra_disks))]


def _chain_nodes(backing: str | None, files: Sequence[Path]) -> Iterator[dict[str, object]]:
    for path in files:
        yield overlay_node(path, backing, read_only=path != files[-1])
        backing = path.stem


def _extra_node(index: int, disk: RawDisk) -> dict[str, object]:
    driver = "host_device" if disk.block_device else "file"
    file = _file(disk.path) | {"driver": driver, "read-only": disk.read_only}
    if disk.direct:
        file |= {"node-name": _direct_node(index), "cache": {"direct": True, "no-flush": False}}
    return {
        "driver": "raw",
        "node-name": f"extra{index}",
        "read-only": disk.read_only,
        "auto-read-only": False,
        "file": file,
    }


def _devices(profile: MachineProfile, config: VmConfig, files: LaunchFiles) -> list[dict[str, object]]:
    """In the order the guest finds them: the root disk is its first disk."""
    suffix = profile.virtio_suffix
    disks = [_disk(suffix, ROOT_NODE, files.overlay.stem)]
    disks += [_disk(suffix, SWAP_NODE, files.swap[-1].stem)] if files.swap else []
    disks += [_disk(suffix, f"extra{index}", f"extra{index}") for index in range(len(files.extra_disks))]
    return [
        {"driver": profile.console_device, "chardev": "console"},
        *disks,
        {"driver": f"virtio-serial{suffix}", "id": "serial0"},
        {"driver": "virtserialport", "bus": "serial0.0", "chardev": "agent", "name": AGENT_PORT},
        _balloon(suffix, config.balloon),
        {"driver": f"virtio-rng{suffix}", "rng": "rng0"},
        *network.nic(suffix, config),
    ]


def _disk(suffix: str, name: str, node: str) -> dict[str, object]:
    return {"driver": f"virtio-blk{suffix}", "id": disk_id(name), "drive": node, "serial": name}


def _balloon(suffix: str, config: BalloonConfig) -> dict[str, object]:
    device: dict[str, object] = {"driver": f"virtio-balloon{suffix}", "id": BALLOON_ID}
    if config.deflate_on_oom:
        device["deflate-on-oom"] = True
    if config.free_page_reporting:
        device["free-page-reporting"] = True
    return device


def disk_id(name: str) -> str:
    """The id of the device of a disk."""
    return f"disk-{name}"
