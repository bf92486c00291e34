"""A user's own arguments for QEMU."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from hvaqemu.config import VmConfig, load_vm
from hvaqemu.errors import ConfigError
from hvaqemu.qemu import unsafe
from hvaqemu.qemu.user_args import _FLAGS, _REFUSED, _VALUES, check, properties
from hvaqemu.units import MiB

GOOD = [
    ["-netdev", "user,id=n0", "-device", "virtio-net-ccw,netdev=n0"],
    [
        "-netdev",
        "tap,id=n0,ifname=tap0,script=no,downscript=no,vhost=off",
        "-device",
        '{"driver":"virtio-net-ccw","netdev":"n0"}',
    ],
    ["-blockdev", '{"driver":"raw","node-name":"d","file":{"driver":"file","filename":"/d"}}'],
    ["-blockdev", "driver=raw,node-name=d,file.driver=file,file.filename=/d,file.cache.direct=off"],
    ["-drive", "if=none,id=d,format=raw,file=/d", "-device", "virtio-blk-ccw,drive=d"],
    ["-object", "iothread,id=io0"],
    ["-object", "rng-random,id=r,filename=/dev/urandom"],
    ["-qmp", "unix:/x/second.sock,server=on,wait=off"],
    ["--qmp", "unix:/x/second.sock,server=on,wait=off"],
    ["-global", "virtio-balloon-ccw.deflate-on-oom=on", "-rtc", "base=utc", "-no-reboot"],
    ["-device", "virtio-gpu-ccw,blob=off"],
    ["-action", "watchdog=reset"],
    # A value that looks like an option is a value.
    ["-serial", "-daemonize"],
]

#: Arguments and what their refusal must name.
BAD = [
    (["-daemonize"], "daemon"),
    (["--daemonize"], "daemon"),
    (["-m", "1G"], "set memory"),
    (["-machine", "s390-ccw-virtio"], "set machine"),
    (["-M", "none"], "set machine"),
    (["-mem-path", "/x"], "one memory back end"),
    (["-mem-prealloc"], "one memory back end"),
    (["-numa", "node,memdev=x"], "one memory back end"),
    (["-object", "memory-backend-ram,id=x,size=1G"], "one memory back end"),
    (["-object", '{"qom-type":"memory-backend-file","id":"x"}'], "one memory back end"),
    (["-object", "qom-type=memory-backend-memfd,id=x"], "one memory back end"),
    (["-device", "vhost-user-fs-ccw,chardev=c"], "another process"),
    (["-device", "vhost-user-blk-pci,chardev=c"], "another process"),
    (["-device", "vhost-vsock-ccw,guest-cid=3"], "kernel vhost"),
    (["-device", '{"driver":"vhost-vsock-ccw","guest-cid":3}'], "kernel vhost"),
    (["-device", "driver=vhost-scsi-ccw"], "kernel vhost"),
    (["-netdev", "tap,id=n,vhost=on"], "kernel vhost"),
    (["-netdev", '{"type":"tap","id":"n","vhost":true}'], "kernel vhost"),
    (["-nic", "tap,vhost=on"], "kernel vhost"),
    (["-net", "tap,vhostfd=7"], "kernel vhost"),
    (["-netdev", "tap,id=n,ifname=tap0"], "script=no,downscript=no"),
    (["-netdev", "bridge,id=n,br=br0"], "start no programs"),
    (["-nic", "user,smb=/x"], "start no programs"),
    (["-netdev", "vhost-user,id=n,chardev=c"], "another process"),
    (["-netdev", "vhost-vdpa,id=n,vhostdev=/dev/vhost-vdpa-0"], "pins"),
    (["-device", "vfio-ccw,sysfsdev=/x"], "pins"),
    (["-device", "vfio-pci,host=0"], "pins"),
    (["-device", "virtio-mem-pci,memdev=x"], "plugs"),
    (["-device", "pc-dimm,memdev=x"], "one memory back end"),
    (["-device", "nvdimm,memdev=x"], "one memory back end"),
    (["-device", "ivshmem-plain,memdev=x"], "one memory back end"),
    (["-device", "virtio-balloon-ccw,free-page-reporting=on"], "free page reporting"),
    (["-device", "virtio-balloon-ccw,free-page-reporting"], "free page reporting"),
    (["-device", '{"driver":"virtio-balloon-ccw","free-page-reporting":true}'], "free page reporting"),
    (["-device", "virtio-balloon-ccw,free_page_reporting=on"], "free page reporting"),
    (["-global", "virtio-balloon-ccw.free-page-reporting=on"], "free page reporting"),
    (["-global", "driver=virtio-balloon-ccw,property=free-page-reporting,value=yes"], "free page reporting"),
    (["-global", "migration.x-postcopy-ram=on"], "userfaultfd of its own"),
    (["-set", "device.balloon0.free-page-reporting=on"], "where the device is given"),
    (["-readconfig", "/x"], "write it as arguments"),
    (["-drive", "file=/d,format=raw,cache=none"], "direct I/O"),
    (["-drive", "file=/d,format=raw,cache.direct=on"], "direct I/O"),
    (["-drive", "file=/d"], "format"),
    (["-hda", "/d"], "format"),
    (["disk.img"], "format"),
    (["-drive", "file=json:{},format=raw"], "-blockdev"),
    (["-blockdev", '{"driver":"raw","file":{"driver":"file","filename":"/d","cache":{"direct":true}}}'], "direct I/O"),
    (["-blockdev", "driver=nvme,device=0,namespace=1"], "direct I/O"),
    (["-device", "scsi-block,drive=d"], "direct I/O"),
    (["-device", "virtio-gpu-pci,blob=on"], "udmabuf"),
    (["-incoming", "defer"], "migrate away only"),
    (["-loadvm", "x"], "snapshot-load"),
    (["-sandbox", "off"], "loosen"),
    (["-S"], "pager is attached"),
    (["-accel", "kvm"], "set accelerator"),
    (["-enable-kvm"], "accelerator"),
    (["-action", "panic=none"], "guest's end"),
    (["-overcommit", "mem-lock=on"], "given back"),
    (["-append", "x"], "set kernel_args"),
    (["-object", "s390-pv-guest,id=pv"], "can not read"),
    (["-async-teardown"], "outlive"),
    (["-frobnicate", "-daemonize"], "not an option that hvaqemu passes on"),
    (["-device"], "needs a value"),
]


def refusals(arguments: list[str]) -> list[tuple[int, str]]:
    return list(check(arguments))


@pytest.mark.parametrize("arguments", GOOD, ids=" ".join)
def test_devices_can_be_added(arguments: list[str]) -> None:
    assert refusals(arguments) == []


@pytest.mark.parametrize(("arguments", "named"), BAD, ids=lambda value: " ".join(value)[:60])
def test_what_would_be_unsafe_is_refused_by_name(arguments: list[str], named: str) -> None:
    ((place, why),) = refusals(arguments)
    assert named in why
    assert arguments[0] in why
    assert place < len(arguments)


@given(
    st.lists(st.sampled_from(GOOD), max_size=4),
    st.sampled_from(BAD),
    st.lists(st.sampled_from(GOOD), max_size=4),
)
def test_what_is_refused_is_refused_wherever_it_stands(
    before: list[list[str]], bad: tuple[list[str], str], after: list[list[str]]
) -> None:
    words = list(chain(*before))
    if bad[0] == ["-device"]:
        after = []
    assert any(bad[1] in why for place, why in refusals([*words, *bad[0], *chain(*after)]) if place >= len(words))


@given(st.lists(st.sampled_from([f"-{name}" for name in (*_REFUSED, *_VALUES, *_FLAGS)] + ["id=x"]), max_size=8))
def test_an_option_that_is_never_passed_on_is_passed_on_as_a_value_only(arguments: list[str]) -> None:
    if refusals(arguments):
        return
    index = 0
    while index < len(arguments):
        name = arguments[index].removeprefix("-")
        assert name in _VALUES or name in _FLAGS
        index += 2 if name in _VALUES else 1


members = st.dictionaries(
    st.from_regex(r"[a-z][a-z0-9-]{0,8}(\.[a-z]{1,6})?", fullmatch=True),
    st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=12),
    max_size=5,
)


@given(members)
def test_a_comma_list_says_what_was_meant(wanted: dict[str, str]) -> None:
    text = ",".join(f"{key}={value}".replace(",", ",,") for key, value in wanted.items())
    assert properties(text, "driver") == wanted


@given(
    st.recursive(
        st.booleans() | st.integers() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(min_size=1, max_size=5), inner, max_size=3),
        max_leaves=8,
    )
)
def test_whatever_json_holds_a_switch_in_it_is_found(value: object) -> None:
    given = {"driver": "virtio-blk-ccw", "x": value, "deep": [{"cache": {"direct": True}}]}
    assert "direct I/O" in unsafe.device(properties(json.dumps(given), "driver"))


def test_a_config_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "vm.yaml"
    path.write_text("name: one\nmemory: 512M\nqemu_args:\n  - -device\n  - vhost-vsock-ccw,guest-cid=3\n")
    with pytest.raises(ConfigError) as caught:
        load_vm(path)
    assert f"{path}:5: key qemu_args[1]: -device vhost-vsock-ccw: kernel vhost" in str(caught.value)


def test_kernel_args_are_one_line() -> None:
    with pytest.raises(ValidationError, match="one line"):
        VmConfig(name="one", memory=512 * MiB, kernel_args="a\nb")
