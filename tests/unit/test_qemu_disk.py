"""Disk images, looked at before QEMU is."""

from __future__ import annotations

import json
import os
import stat
import subprocess
from pathlib import Path

import pytest

from hvaqemu.config import ExtraDisk
from hvaqemu.errors import ConfigError, HostError
from hvaqemu.qemu.command import RawDisk
from hvaqemu.qemu.disk import check_extra_disks, check_raw, create_overlay
from hvaqemu.units import MiB


def raw(path: Path, size: int = MiB) -> Path:
    path.touch()
    os.truncate(path, size)
    return path


def test_overlay_names_its_backing_file_and_format(tmp_path: Path) -> None:
    folder = tmp_path / "a,b c"
    folder.mkdir()
    golden, overlay = raw(folder / "golden,x.raw", 8 * MiB), folder / "over:lay.qcow2"
    create_overlay(golden, overlay)
    info = json.loads(
        subprocess.run(
            ["qemu-img", "info", "--output=json", "-f", "qcow2", str(overlay)],
            capture_output=True,
            check=True,
            timeout=30,
        ).stdout
    )
    assert (info["format"], info["backing-filename-format"], info["virtual-size"]) == ("qcow2", "raw", 8 * MiB)
    assert info["full-backing-filename"] == str(golden)
    assert stat.S_IMODE(overlay.stat().st_mode) == 0o600


def test_overlay_by_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative name with a colon would be a protocol for qemu-img."""
    monkeypatch.chdir(tmp_path)
    raw(tmp_path / "nbd:golden")
    create_overlay(Path("nbd:golden"), Path("nbd:overlay"))
    assert (tmp_path / "nbd:overlay").is_file()


def test_overlay_is_never_overwritten(tmp_path: Path) -> None:
    overlay = tmp_path / "overlay"
    overlay.write_text("precious")
    with pytest.raises(HostError, match="is already there"):
        create_overlay(raw(tmp_path / "golden"), overlay)
    assert overlay.read_text() == "precious"


def test_overlay_that_can_not_be_made_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="nowhere"):
        create_overlay(raw(tmp_path / "golden"), tmp_path / "nowhere" / "overlay")
    assert [entry.name for entry in tmp_path.iterdir()] == ["golden"]


def test_no_qemu_img(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(HostError, match="install the package qemu-utils"):
        create_overlay(raw(tmp_path / "golden"), tmp_path / "overlay")


def test_golden_image_must_be_a_disk(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="golden: No such file"):
        create_overlay(tmp_path / "golden", tmp_path / "overlay")
    with pytest.raises(ConfigError, match="golden: 1000 bytes, but a disk has a multiple of 512"):
        create_overlay(raw(tmp_path / "golden", 1000), tmp_path / "overlay")


def test_extra_disks(tmp_path: Path) -> None:
    one, two = raw(tmp_path / "one"), raw(tmp_path / "two")
    disks = [ExtraDisk(path=one), ExtraDisk(path=two, read_only=True)]
    assert check_extra_disks(disks) == (RawDisk(one, False, False), RawDisk(two, True, False, layer=True))


@pytest.mark.parametrize(
    ("keys", "layer"),
    [
        ({"read_only": True}, True),
        ({"read_only": True, "layer": True}, True),
        ({"read_only": True, "layer": False}, False),
        ({"read_only": True, "direct": True}, False),
        ({}, False),
    ],
)
def test_only_what_does_not_change_is_a_layer(tmp_path: Path, keys: dict[str, bool], layer: bool) -> None:
    (found,) = check_extra_disks([ExtraDisk(path=raw(tmp_path / "disk"), **keys)])
    assert found.layer is layer


def test_content_of_a_raw_disk_is_never_looked_at(tmp_path: Path) -> None:
    disk = raw(tmp_path / "disk")
    with disk.open("r+b") as file:
        file.write(b"QFI\xfb\0\0\0\3")
    assert check_extra_disks([ExtraDisk(path=disk)]) == (RawDisk(disk, False, False),)


def test_wrong_extra_disks(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path, says in (
        (tmp_path / "absent", "extra_disks[0]: {path}: No such file or directory"),
        (tmp_path, "extra_disks[0]: {path}: is not a file or block device"),
        (pipe, "extra_disks[0]: {path}: is not a file or block device"),
        (raw(tmp_path / "empty", 0), "extra_disks[0]: {path}: 0 bytes, but a disk has a multiple of 512"),
        (raw(tmp_path / "odd", 513), "extra_disks[0]: {path}: 513 bytes, but a disk has a multiple of 512"),
    ):
        with pytest.raises(ConfigError) as caught:
            check_extra_disks([ExtraDisk(path=path)])
        assert caught.value.message == says.format(path=path)


def test_one_disk_twice(tmp_path: Path) -> None:
    disk = raw(tmp_path / "disk")
    other = tmp_path / "other"
    other.symlink_to(disk)
    with pytest.raises(ConfigError, match=r"extra_disks\[1\]: .*other: is the same disk as extra_disks\[0\]"):
        check_extra_disks([ExtraDisk(path=disk, read_only=True), ExtraDisk(path=other)])
    both = check_extra_disks([ExtraDisk(path=disk, read_only=True), ExtraDisk(path=other, read_only=True)])
    # Once is enough.
    assert [each.layer for each in both] == [True, False]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anything")
def test_read_only_file(tmp_path: Path) -> None:
    disk = raw(tmp_path / "disk")
    disk.chmod(0o444)
    with pytest.raises(ConfigError, match="set read_only: true"):
        check_raw(disk, read_only=False)
    check_raw(disk, read_only=True)
