"""VM and image files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from hvaqemu.config import (
    Accelerator,
    BalloonConfig,
    ExtraDisk,
    FreezeConfig,
    StoreConfig,
    VmConfig,
    image_path,
    load_vm,
)
from hvaqemu.errors import ConfigError
from hvaqemu.image_config import ImageConfig, load_image
from hvaqemu.units import GiB, MiB

VM = "name: one\nmemory: 512M\n"


def write(folder: Path, text: str, name: str = "vm.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def complaint(folder: Path, text: str) -> str:
    """What is said of a wrong file, without the folder."""
    with pytest.raises(ConfigError) as caught:
        load_vm(write(folder, text))
    return str(caught.value).removeprefix(f"{folder}/")


def test_the_store_is_a_quarter_of_the_memory_unless_said(tmp_path: Path) -> None:
    assert load_vm(write(tmp_path, VM)).store_limit == 128 * MiB
    assert load_vm(write(tmp_path, f"{VM}store: {{limit: 3M}}\n")).store_limit == 3 * MiB
    assert load_vm(write(tmp_path, f"{VM}store: {{limit: 0}}\n")).store_limit == 0
    said = complaint(tmp_path, f"{VM}store:\n  limit: 513M\n")
    assert said == "vm.yaml:4: key store.limit: is more than the VM's memory, 512.0 MiB"
    assert "key store.size: is not a known key" in complaint(tmp_path, f"{VM}store: {{size: 1M}}\n")


names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", fullmatch=True)
paths = st.text(st.characters(blacklist_characters="\0", blacklist_categories=["Cs"]), min_size=1, max_size=30).map(
    Path
)
images = st.builds(
    ImageConfig,
    name=st.from_regex(r"[a-z0-9][a-z0-9._-]{0,39}", fullmatch=True).filter(lambda name: name != "debian-s390x"),
    packages=st.lists(st.from_regex(r"[a-z0-9][a-z0-9+.-]{1,20}", fullmatch=True), max_size=3),
    files=st.dictionaries(names.map(lambda name: f"/opt/{name}"), paths, max_size=3),
    size=st.none() | st.integers(64, 4096).map(lambda count: count * MiB),
)
vms = st.builds(
    VmConfig,
    name=names,
    machine=st.just("s390x"),
    accelerator=st.sampled_from(Accelerator),
    memory=st.integers(128, 1 << 20).map(lambda count: count * MiB),
    cpus=st.integers(1, 248),
    image=names | images,
    extra_disks=st.lists(
        st.builds(ExtraDisk, path=paths, read_only=st.booleans()), max_size=3, unique_by=lambda d: d.path
    ),
    kernel_args=st.from_regex(r"[ -~]{0,20}", fullmatch=True),
    qemu_args=st.lists(st.sampled_from(["-usb", "-no-reboot", "--snapshot"]), max_size=3).map(tuple),
    store=st.builds(StoreConfig, limit=st.none() | st.integers(0, 128 * MiB)),
    allow_exec=st.booleans(),
    boot_timeout=st.floats(1e-6, 1e6),
    protection_limit=st.floats(0.05, 1e3),
)


@given(vms)
def test_json_round_trip(config: VmConfig) -> None:
    assert VmConfig.model_validate_json(config.model_dump_json()) == config


@given(vms)
def test_round_trip_through_plain_data(config: VmConfig) -> None:
    """What a YAML writer would emit loads again, too: no field needs JSON's leniency."""
    assert VmConfig.model_validate(json.loads(config.model_dump_json())) == config


def test_smallest_file(tmp_path: Path) -> None:
    config = load_vm(write(tmp_path, VM))
    assert (config.name, config.memory, config.cpus, config.image) == ("one", 512 * MiB, 1, "debian-s390x")
    assert (config.allow_exec, config.extra_disks, config.accelerator) == (False, (), Accelerator.TCG)
    assert config.boot_timeout == 60.0
    assert config.profile.machine == "s390-ccw-virtio"


def test_all_keys(tmp_path: Path) -> None:
    text = VM + (
        "machine: s390x\naccelerator: kvm\ncpus: 4\nallow_exec: true\nboot_timeout: 2m\n"
        "image: {name: mine, packages: [fio, stress-ng], files: {/opt/job.sh: ./job.sh}, size: 2G}\n"
        "extra_disks: [{path: data.raw, read_only: true}, {path: /dev/loop9}]\n"
        "swap: 256M\nkeep_disks: true\nfreeze: {after: 64M, every: 5m, disk_budget: 2G, depth: 3}\n"
        "reclaim: {mode: off}\nballoon: {free_page_reporting: true, deflate_on_oom: true}\n"
    )
    config = load_vm(write(tmp_path, text))
    assert (config.swap, config.keep_disks) == (256 * MiB, True)
    assert config.freeze == FreezeConfig(after=64 * MiB, every=300.0, disk_budget=2 * GiB, depth=3)
    assert config.balloon == BalloonConfig(deflate_on_oom=True, free_page_reporting=True)
    assert config.accelerator is Accelerator.KVM
    assert config.boot_timeout == 120.0
    assert [disk.path for disk in config.extra_disks] == [tmp_path / "data.raw", Path("/dev/loop9")]
    image = config.image
    assert isinstance(image, ImageConfig)
    assert (image.base, image.packages, image.size) == ("debian-s390x", ("fio", "stress-ng"), 2 * GiB)
    assert image.files == {"/opt/job.sh": tmp_path / "job.sh"}


def test_below_a_vm_key_and_beside_steps(tmp_path: Path) -> None:
    plain = load_vm(write(tmp_path, VM))
    below = load_vm(write(tmp_path, "vm:\n  name: one\n  memory: 512M\nsteps:\n  - measure: x\n", "scenario.yaml"))
    assert below == plain


def test_image_file(tmp_path: Path) -> None:
    image = load_image(write(tmp_path, "name: mine\nfiles: {/opt/a: a}\nsize: 100000000\n", "mine.yaml"))
    assert image.files == {"/opt/a": tmp_path / "a"}
    assert image.size == 96 * MiB


def test_image_by_path_is_relative_to_the_file(tmp_path: Path) -> None:
    image = load_vm(write(tmp_path, VM + "image: ./mine.yaml\n")).image
    assert isinstance(image, str)
    assert image_path(image) == tmp_path / "mine.yaml"
    assert image_path("debian-s390x") is None


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (VM + "cpu: 2\n", "vm.yaml:3: key cpu: is not a known key"),
        ("vm:\n  name: one\n  memory: 512M\n  cpu: 2\n", "vm.yaml:4: key vm.cpu: is not a known key"),
        ("memory: 512M\n", "vm.yaml:1: key name: is missing"),
        ("name: one\nmemory: 512X\n", "vm.yaml:2: key memory: '512X' is not a size; write for example 512M or 2G"),
        ("name: one\nmemory: 16M\n", "vm.yaml:2: key memory: 16.0 MiB is too little for s390x; give at least 128M"),
        ("name: one\nmemory: 268435457\n", "vm.yaml:2: key memory: 268435457 bytes is not a whole number of 1M"),
        ("name: one\nmemory: -1\n", "vm.yaml:2: key memory: input should be greater than or equal to 0, not -1"),
        ("name: one\nmemory: [1]\n", "vm.yaml:2: key memory: write a size, for example 512M"),
        ("name: 'a,b'\nmemory: 512M\n", "vm.yaml:1: key name: must be 1 to 63 letters"),
        (f"name: {'a' * 64}\nmemory: 512M\n", "vm.yaml:1: key name: must be 1 to 63 letters"),
        ("name: -a\nmemory: 512M\n", "vm.yaml:1: key name: must be 1 to 63 letters"),
        (VM + "swap: 1M\n", "vm.yaml:3: key swap: must be a multiple of 4096 and at least 16.0 MiB"),
        (VM + "swap: 33554433\n", "vm.yaml:3: key swap: must be a multiple of 4096 and at least 16.0 MiB"),
        (VM + "swap: x\n", "vm.yaml:3: key swap: 'x' is not a size; write for example 512M or 2G"),
        (VM + "keep_disks: 1\n", "vm.yaml:3: key keep_disks: input should be a valid boolean"),
        (VM + "freeze: {after: 1M}\n", "vm.yaml:3: key freeze.after: at least 16.0 MiB: each freeze makes a file"),
        (VM + "freeze: {depth: 17}\n", "vm.yaml:3: key freeze.depth: input should be less than or equal to 16"),
        (VM + "freeze: {every: never}\n", "vm.yaml:3: key freeze.every: 'never' is not a duration"),
        (VM + "freeze: {often: 1}\n", "vm.yaml:3: key freeze.often: is not a known key"),
        (
            VM + "balloon: {free_page_reporting: true}\n",
            "vm.yaml:3: key balloon.free_page_reporting: needs `reclaim: {mode: off}`",
        ),
        (VM + "balloon: {deflate: true}\n", "vm.yaml:3: key balloon.deflate: is not a known key"),
        (VM + "machine: pc\n", "vm.yaml:3: key machine: 'pc' is not a machine profile; known: s390x"),
        (VM + "accelerator: xen\n", "vm.yaml:3: key accelerator: input should be 'tcg' or 'kvm', not 'xen'"),
        (VM + "cpus: 0\n", "vm.yaml:3: key cpus: input should be greater than or equal to 1, not 0"),
        (VM + "cpus: 249\n", "vm.yaml:3: key cpus: 249 is more than the 248 of s390x"),
        (VM + "cpus: '2'\n", "vm.yaml:3: key cpus: input should be a valid integer, not '2'"),
        (VM + "allow_exec: 1\n", "vm.yaml:3: key allow_exec: input should be a valid boolean, not 1"),
        ("name: one\nmemory: " + "9" * 400 + "\n", "vm.yaml:2: key memory: "),
        (VM + "boot_timeout: 0\n", "vm.yaml:3: key boot_timeout: input should be greater than 0, not 0"),
        (VM + "protection_limit: 1ms\n", "vm.yaml:3: key protection_limit: must be at least 50ms: two scans"),
        (VM + "translation_buffer: 2M\n", "vm.yaml:3: key translation_buffer: must be whole MiB, from 4.0 MiB"),
        (VM + "translation_buffer: 8193K\n", "vm.yaml:3: key translation_buffer: must be whole MiB"),
        (VM + "accelerator: kvm\ntranslation_buffer: 16M\n", "vm.yaml:4: key translation_buffer: accelerator kvm"),
        (VM + "boot_timeout: soon\n", "vm.yaml:3: key boot_timeout: 'soon' is not a duration"),
        (VM + "image: 5\n", "vm.yaml:3: key image: must be the name of an image"),
        (VM + "store: 12M\n", "vm.yaml:3: key store: should have keys of its own, not be '12M'"),
        (VM + "freeze:\n", "vm.yaml:3: key freeze: should have keys of its own, not be nothing"),
        (VM + "image: {name: x, pkgs: []}\n", "vm.yaml:3: key image.pkgs: is not a known key"),
        (VM + "image: {name: x, size: 100}\n", "vm.yaml:3: key image.size: must be between 64M and 4T"),
        (VM + "image: {name: x, packages: ['-o']}\n", "vm.yaml:3: key image.packages[0]: '-o' is not the name of"),
        (
            VM + "image: {name: x, files: {../a: b}}\n",
            "vm.yaml:3: key image.files.../a: '../a' must be the",
        ),
        (VM + "image: {name: x, files: {/dev/a: b}}\n", "vm.yaml:3: key image.files./dev/a: '/dev/a' is in a place"),
        (VM + "image: {name: debian-s390x}\n", "vm.yaml:3: key image.name: debian-s390x is the default image"),
        (VM + "image: {name: x, base: y}\n", "vm.yaml:3: key image.base: 'y' is no image to build on"),
        (VM + "extra_disks:\n - path: a\n - path: a\n", "vm.yaml:5: key extra_disks[1].path: a is already disk 0"),
        (
            VM + "extra_disks:\n - {path: a, layer: true}\n",
            "vm.yaml:4: key extra_disks[0].layer: a disk that is written",
        ),
        (
            VM + "extra_disks:\n - {path: a, layer: true, read_only: true, direct: true}\n",
            "vm.yaml:4: key extra_disks[0].layer: a disk with direct I/O",
        ),
        (VM + "extra_disks:\n - path: ''\n", "vm.yaml:4: key extra_disks[0].path: must be a path"),
    ],
)
def test_wrong_file_names_line_and_key(tmp_path: Path, text: str, says: str) -> None:
    said = complaint(tmp_path, text)
    assert said.startswith(says)
    assert "\n" not in said


def test_two_complaints_of_one_kind_are_counted(tmp_path: Path) -> None:
    assert complaint(tmp_path, "name: one\nmemory: 16M\ncpus: 300\n").endswith("(and 1 more)")


def test_frozen() -> None:
    config = VmConfig(name="one", memory=512 * MiB)
    with pytest.raises(ValidationError):
        config.name = "two"  # type: ignore[misc, unused-ignore]
