"""Fleet files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hvaqemu.errors import ConfigError
from hvaqemu.fleet_config import FleetConfig, MetricsConfig, PressureConfig, load_fleet
from hvaqemu.reclaim_config import ReclaimMode
from hvaqemu.units import GiB, MiB


def write(folder: Path, text: str, name: str = "fleet.yaml") -> Path:
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return path


def complaint(folder: Path, text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_fleet(write(folder, text))
    return str(caught.value).removeprefix(f"{folder}/")


def test_the_smallest(tmp_path: Path) -> None:
    fleet = load_fleet(write(tmp_path, "vms: []\n"))
    assert fleet == FleetConfig()
    assert (fleet.budget, fleet.available_min, fleet.metrics) == (None, None, None)


def test_all_keys(tmp_path: Path) -> None:
    text = (
        "budget: 4G\navailable_min: 300M\npressure: {psi_some: 20%, cgroup_headroom: 10%, balloon: false}\n"
        'metrics: {listen: "127.0.0.1:9777"}\nvms:\n  - {name: a, memory: 512M}\n'
    )
    fleet = load_fleet(write(tmp_path, text))
    assert (fleet.budget, fleet.available_min) == (4 * GiB, 300 * MiB)
    assert fleet.pressure == PressureConfig.model_validate(
        {"psi_some": "20%", "cgroup_headroom": "10%", "balloon": False}
    )
    assert fleet.metrics is not None
    assert (fleet.metrics.address, fleet.metrics.path) == (("127.0.0.1", 9777), None)
    assert [vm.name for vm in fleet.vms] == ["a"]


def test_defaults_hold_for_the_keys_a_vm_does_not_have(tmp_path: Path) -> None:
    write(tmp_path, "vm: {name: c, memory: 512M, reclaim: {shares: 300}}\n", "c.yaml")
    text = (
        "defaults: {reclaim: {mode: proactive, shares: 200, cpu_limit: 1%}}\n"
        "vms:\n  - {name: a, memory: 512M}\n  - {name: b, memory: 512M, reclaim: {mode: off}}\n  - c.yaml\n"
    )
    a, b, c = (vm.reclaim for vm in load_fleet(write(tmp_path, text)).vms)
    assert (a.mode, a.shares, a.cpu_limit) == (ReclaimMode.PROACTIVE, 200, 0.01)
    assert (b.mode, b.shares, b.cpu_limit) == (ReclaimMode.OFF, 200, 0.01)
    assert (c.mode, c.shares, c.cpu_limit) == (ReclaimMode.PROACTIVE, 300, 0.01)


def test_a_default_target_is_for_those_that_have_one(tmp_path: Path) -> None:
    text = (
        "defaults: {reclaim: {target: 128M}}\n"
        "vms:\n  - {name: a, memory: 512M}\n  - {name: b, memory: 512M, reclaim: {mode: target}}\n"
    )
    a, b = (vm.reclaim for vm in load_fleet(write(tmp_path, text)).vms)
    assert (a.mode, a.target) == (ReclaimMode.MANUAL, None)
    assert (b.mode, b.target) == (ReclaimMode.TARGET, 128 * MiB)


def test_paths_mean_the_folder_of_their_own_file(tmp_path: Path) -> None:
    write(tmp_path / "vms", "name: one\nmemory: 512M\nextra_disks: [{path: data.raw}]\n", "one.yaml")
    text = (
        "metrics: {listen: ./metrics.sock}\n"
        "vms:\n  - vms/one.yaml\n  - {name: two, memory: 512M, extra_disks: [{path: data.raw}]}\n"
    )
    fleet = load_fleet(write(tmp_path, text))
    disks = [vm.extra_disks[0].path for vm in fleet.vms]
    assert disks == [tmp_path / "vms/data.raw", tmp_path / "data.raw"]
    assert fleet.metrics is not None
    assert fleet.metrics.path == tmp_path / "metrics.sock"


def test_round_trip(tmp_path: Path) -> None:
    text = "defaults: {reclaim: {target: 128M}}\nvms:\n  - {name: b, memory: 512M, reclaim: {mode: target}}\n"
    fleet = load_fleet(write(tmp_path, text))
    assert FleetConfig.model_validate(json.loads(fleet.model_dump_json())) == fleet


_TWO = "vms:\n  - {name: a, memory: 512M}\n  - {name: a, memory: 512M}\n"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (_TWO, "fleet.yaml:3: key vms[1]: 'a' is already the name of VM 0"),
        ("vm: []\n", "fleet.yaml:1: key vm: is not a known key"),
        ("vms:\n  - {name: a, memory: 512M, cpu: 1}\n", "fleet.yaml:2: key vms[0].cpu: is not a known key"),
        ("vms: [1]\n", "fleet.yaml:1: key vms[0]: should have keys of its own, not be 1"),
        ("vms: ['']\n", "fleet.yaml:1: key vms[0]: must be the path of a VM file, or a VM"),
        ("vms: [none.yaml]\n", "none.yaml: No such file or directory"),
        ("vms: [bad.yaml]\n", "bad.yaml:1: key memory: is missing"),
        ("defaults: {reclaim: {mode: often}}\nvms: [bad.yaml]\n", "bad.yaml:1: key memory: is missing"),
        ("defaults: {reclaim: {mod: off}}\n", "fleet.yaml:1: key defaults.reclaim.mod: is not a known key"),
        ("defaults: {memory: 1G}\n", "fleet.yaml:1: key defaults.memory: is not a known key"),
        ("budget: 0\n", "fleet.yaml:1: key budget: input should be greater than 0"),
        ("budget: 1M\nvms: [{name: a, memory: 512M}]\n", "fleet.yaml:1: key budget: is less than the min_resident"),
        ("pressure: {psi_some: 0%}\n", "fleet.yaml:1: key pressure.psi_some: input should be greater than 0"),
        ("pressure: {psi_some: 10}\n", "fleet.yaml:1: key pressure.psi_some: write a share with its %"),
        ("metrics: {listen: '0.0.0.0:9777'}\n", "fleet.yaml:1: key metrics.listen: must be a loopback address"),
        ("metrics: {listen: '127.0.0.1:99999'}\n", "fleet.yaml:1: key metrics.listen: must be a loopback address"),
    ],
)
def test_wrong_files(tmp_path: Path, text: str, says: str) -> None:
    write(tmp_path, "name: bad\n", "bad.yaml")
    said = complaint(tmp_path, text)
    assert said.startswith(says)
    assert "\n" not in said


@pytest.mark.parametrize("listen", ["localhost:1", "[::1]:9777", "127.0.0.1:65535"])
def test_loopback_addresses(listen: str) -> None:
    host, port = MetricsConfig(listen=listen).address or ("", 0)
    assert f"{host}:{port}" == listen.replace("[", "").replace("]", "")
