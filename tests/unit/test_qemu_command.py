"""QEMU's command line."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvaqemu.config import Accelerator, BalloonConfig, VmConfig
from hvaqemu.network_config import NoNetwork
from hvaqemu.qemu.command import LaunchFiles, LaunchSockets, RawDisk, build_command, shell_line
from hvaqemu.qemu.profile import S390X
from hvaqemu.reclaim_config import ReclaimConfig, ReclaimMode
from hvaqemu.units import MiB

CONFIG = VmConfig(name="one", memory=512 * MiB, cpus=2, network=NoNetwork())
FILES = LaunchFiles(
    kernel=Path("/i/kernel"),
    initrd=Path("/i/initrd"),
    kernel_args="root=/dev/vda rw",
    golden=Path("/i/root.raw"),
    overlay=Path("/v/root.qcow2"),
    console_log=Path("/r/console.log"),
)
SOCKETS = LaunchSockets(qmp=7, agent=8)
#: Every byte a path can hold, and what QEMU's option syntax and JSON give a meaning to.
nasty_paths = st.text(
    st.characters(blacklist_characters="\0", blacklist_categories=["Cs"]) | st.sampled_from(',=:"\\{} \n'),
    min_size=1,
    max_size=40,
).map(lambda text: Path("/d") / text.lstrip("/"))


def command(config: VmConfig = CONFIG, files: LaunchFiles = FILES) -> list[str]:
    return build_command(S390X, config, files, SOCKETS)


def values(argv: list[str], option: str) -> list[str]:
    return [argv[index + 1] for index, word in enumerate(argv) if word == option]


def objects(argv: list[str], option: str) -> list[dict[str, object]]:
    return [json.loads(value) for value in values(argv, option)]


def test_machine() -> None:
    argv = command()
    assert argv[0] == "qemu-system-s390x"
    assert values(argv, "-machine") == ["s390-ccw-virtio,memory-backend=ram0"]
    assert values(argv, "-accel") == ["tcg,tb-size=32,thread=multi"]
    assert values(argv, "-m") == ["512M"]
    assert values(argv, "-smp") == ["2"]
    assert {"-S", "-nodefaults", "-no-user-config"} <= set(argv)
    assert values(argv, "-action") == ["panic=pause"]
    assert values(argv, "-display") == ["none"]


def test_ram_is_one_shared_memfd() -> None:
    memory = [value for value in objects(command(), "-object") if value["id"] == "ram0"]
    assert memory == [{"qom-type": "memory-backend-memfd", "id": "ram0", "size": 512 * MiB, "share": True}]


def test_a_translation_buffer_of_the_users_size() -> None:
    config = VmConfig(name="small", memory=512 * MiB, translation_buffer=16 * MiB)
    assert values(command(config), "-accel") == ["tcg,tb-size=16,thread=multi"]


def test_kvm() -> None:
    assert values(command(CONFIG.model_copy(update={"accelerator": Accelerator.KVM})), "-accel") == ["kvm"]


def test_exec_switch_only_where_allowed() -> None:
    assert values(command(), "-append") == ["root=/dev/vda rw"]
    allowed = CONFIG.model_copy(update={"allow_exec": True})
    assert values(command(allowed), "-append") == ["root=/dev/vda rw hva.exec=1"]
    assert values(command(allowed, replace(FILES, kernel_args="")), "-append") == ["hva.exec=1"]


def test_a_users_own_arguments_come_last() -> None:
    own = ("-device", "virtio-tablet-ccw", "-usb")
    argv = command(CONFIG.model_copy(update={"qemu_args": own, "kernel_args": "page_poison=1", "allow_exec": True}))
    assert tuple(argv[-3:]) == own
    assert values(argv, "-append") == ["root=/dev/vda rw page_poison=1 hva.exec=1"]


def test_the_balloon_does_by_itself_only_what_the_config_says() -> None:
    def balloon(**keys: bool) -> dict[str, object]:
        config = VmConfig(
            name="one", memory=512 * MiB, reclaim=ReclaimConfig(mode=ReclaimMode.OFF), balloon=BalloonConfig(**keys)
        )
        (device,) = (found for found in objects(command(config), "-device") if found.get("id") == "balloon0")
        return device

    plain = {"driver": "virtio-balloon-ccw", "id": "balloon0"}
    assert balloon() == plain
    assert balloon(deflate_on_oom=True) == plain | {"deflate-on-oom": True}
    assert balloon(free_page_reporting=True) == plain | {"free-page-reporting": True}


def test_sockets_are_inherited() -> None:
    sockets = [value for value in values(command(), "-chardev") if value.startswith("socket")]
    assert sockets == ["socket,id=qmp,fd=7,server=on,wait=off", "socket,id=agent,fd=8,server=on,wait=off"]


def test_no_image_format_is_ever_probed_nor_written_around_the_page_cache() -> None:
    files = replace(FILES, extra_disks=(RawDisk(Path("/e/a"), True), RawDisk(Path("/dev/sdz"), False, True)))
    nodes = objects(command(files=files), "-blockdev")
    assert [(node["driver"], node["node-name"], node["read-only"]) for node in nodes] == [
        ("raw", "golden", True),
        ("qcow2", "root", False),
        ("raw", "extra0", True),
        ("raw", "extra1", False),
    ]
    protocols = [node["file"] for node in nodes]
    assert all(isinstance(file, dict) and file["cache"]["direct"] is False for file in protocols)
    assert [file["driver"] for file in protocols if isinstance(file, dict)] == ["file", "file", "file", "host_device"]
    # Of a file that may be frozen it is left to the node above, so that QEMU closes its writable descriptor then.
    assert [file.get("read-only") for file in protocols if isinstance(file, dict)] == [True, None, True, False]
    assert nodes[1]["backing"] == "golden"
    assert all(node["auto-read-only"] is False for node in nodes)


def test_a_chain_is_opened_bottom_first_and_written_at_its_top_only() -> None:
    frozen = (Path("/v/root.qcow2"), Path("/v/root-4.qcow2"))
    swap = (Path("/v/swap.qcow2"), Path("/v/swap-1.qcow2"))
    argv = command(files=replace(FILES, frozen=frozen, overlay=Path("/v/root-7.qcow2"), swap=swap))
    nodes = objects(argv, "-blockdev")
    assert [(node["node-name"], node.get("backing"), node["read-only"]) for node in nodes] == [
        ("golden", None, True),
        ("root", "golden", True),
        ("root-4", "root", True),
        ("root-7", "root-4", False),
        ("swap", None, True),
        ("swap-1", "swap", False),
    ]
    disks = [device for device in objects(argv, "-device") if "drive" in device]
    assert [(disk["id"], disk["drive"], disk["serial"]) for disk in disks] == [
        ("disk-root", "root-7", "root"),
        ("disk-swap", "swap-1", "swap"),
    ]
    assert "hva.swap=1" in values(argv, "-append")[0].split()
    assert "hva.swap=1" not in values(command(), "-append")[0].split()


def test_devices_root_disk_first() -> None:
    files = replace(FILES, extra_disks=(RawDisk(Path("/e/a"), True),))
    devices = objects(command(files=files), "-device")
    assert [device["driver"] for device in devices] == [
        "sclpconsole",
        "virtio-blk-ccw",
        "virtio-blk-ccw",
        "virtio-serial-ccw",
        "virtserialport",
        "virtio-balloon-ccw",
        "virtio-rng-ccw",
    ]
    assert [device["serial"] for device in devices if device["driver"] == "virtio-blk-ccw"] == ["root", "extra0"]
    assert devices[4]["name"] == "org.hvaqemu.agent.0"
    balloon = devices[5]
    assert balloon == {"driver": "virtio-balloon-ccw", "id": "balloon0"}


@given(nasty_paths, nasty_paths, nasty_paths)
def test_paths_never_change_a_meaning(golden: Path, overlay: Path, extra: Path) -> None:
    """Whatever paths hold, each argument is the same but for the path itself."""
    plain = command(files=replace(FILES, extra_disks=(RawDisk(Path("/plain"), True),)))
    # A file of ours has a name of ours, which is its node's too; its folder may be called anything.
    overlay = overlay / "root.qcow2"
    files = replace(FILES, golden=golden, overlay=overlay, extra_disks=(RawDisk(extra, True),))
    nasty = command(files=files)
    assert [a for a, b in zip(plain, nasty, strict=True) if a != b] == [
        value for value in values(plain, "-blockdev") if value not in values(nasty, "-blockdev")
    ]
    for before, after in zip(objects(plain, "-blockdev"), objects(nasty, "-blockdev"), strict=True):
        assert isinstance(before["file"], dict)
        assert isinstance(after["file"], dict)
        assert {**before, "file": None} == {**after, "file": None}
        assert {**before["file"], "filename": None} == {**after["file"], "filename": None}
    names = [node["file"]["filename"] for node in objects(nasty, "-blockdev") if isinstance(node["file"], dict)]
    assert names == [str(golden), str(overlay), str(extra)]


@given(nasty_paths)
def test_console_path_in_a_comma_list(path: Path) -> None:
    value = values(command(files=replace(FILES, console_log=path)), "-chardev")[-1]
    # As util/keyval.c reads it: ",," is a comma, a single one ends the value.
    pairs: list[str] = []
    current = ""
    index = 0
    while index < len(value):
        if value[index : index + 2] == ",,":
            current += ","
            index += 2
        elif value[index] == ",":
            pairs.append(current)
            current = ""
            index += 1
        else:
            current += value[index]
            index += 1
    assert [*pairs, current] == ["file", "id=console", f"path={path}", "append=on"]


@pytest.mark.parametrize("kernel", ["/a b/kernel", "/a,b=c/kernel"])
def test_shell_line(kernel: str) -> None:
    argv = command(files=replace(FILES, kernel=Path(kernel)))
    assert shlex.split(shell_line(argv)) == argv
    assert kernel in argv
