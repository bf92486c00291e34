"""Checks of the host. The real ones run on the host the tests run on; what it can not show is shown with files."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from hva_host import doctor
from hva_host.doctor import Check, examine
from hva_host.privileges import privileges
from hvaqemu.errors import HostError
from hvaqemu.qemu.profile import S390X


@pytest.fixture
def own_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("RUNTIME", "CACHE", "STATE"):
        monkeypatch.setenv(f"HVAQEMU_{name}_DIR", str(tmp_path / name.lower()))
    return tmp_path


def by_name(checks: list[Check]) -> dict[str, Check]:
    return {check.name: check for check in checks}


def test_every_check_that_fails_says_what_to_do(own_places: Path) -> None:
    checks = examine()
    assert len(by_name(checks)) == len(checks)
    for check in checks:
        assert check.found
        assert check.ok == (not check.advice), check
        assert "\n" not in check.found + check.advice
    assert by_name(checks)["Python"].ok
    assert Check.model_validate_json(checks[0].model_dump_json()) == checks[0]


def test_nothing_installed(own_places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(own_places))
    monkeypatch.setattr(doctor, "_MORE_PATH", str(own_places))
    checks = by_name(examine())
    assert checks["qemu-system-s390x"].advice == "install the package qemu-system-misc"
    assert checks["qemu-img"].advice == "install the package qemu-utils"
    assert checks["mmdebstrap"].advice == "install the package mmdebstrap"
    assert checks["mke2fs"].advice == "install the package e2fsprogs"
    assert checks["shim"].found == "gcc: not found"
    assert not any(checks[name].ok for name in ("qemu-system-s390x", "qemu-img", "mmdebstrap", "mke2fs", "shim"))


@pytest.mark.parametrize(
    ("prints", "accelerators", "ok"),
    [
        ("QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg)", "tcg", True),
        ("QEMU emulator version 10.0.0", "tcg", True),
        ("QEMU emulator version 6.2.0", "tcg", False),
        ("QEMU emulator version 7.2.22", "kvm", False),
        ("something else", "tcg", False),
    ],
)
def test_version_and_accelerators_of_qemu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prints: str, accelerators: str, ok: bool
) -> None:
    program = tmp_path / S390X.binary
    program.write_text(
        f'#!/bin/sh\n[ "$1" = -accel ] && printf "Accelerators supported:\\n{accelerators}\\n" || echo "{prints}"\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    check = doctor._qemu(S390X)
    assert (check.ok, check.advice == "") == (ok, ok)
    assert accelerators in check.found


def test_features() -> None:
    everything = doctor._features(0xFFFF, "6.1")
    assert everything.ok
    assert everything.found == "Linux 6.1: pagefault-flag-wp, missing-shmem, wp-hugetlbfs-shmem"
    old = doctor._features(0x3F, "5.10")
    assert (old.ok, old.found) == (False, "Linux 5.10: no wp-hugetlbfs-shmem")
    assert "5.19" in old.advice


@pytest.mark.parametrize(
    ("text", "ok"),
    [
        ("always within_size advise [never] deny force", True),
        ("always within_size [advise] never deny force", True),
        ("always within_size advise never [deny] force", True),
        ("[always] within_size advise never deny force", False),
        ("always [within_size] advise never deny force", False),
        ("always within_size advise never deny [force]", False),
    ],
)
def test_huge_pages(tmp_path: Path, text: str, ok: bool) -> None:
    (tmp_path / "shmem_enabled").write_text(text + "\n")
    size = tmp_path / "hugepages-64kB"
    size.mkdir()
    (size / "shmem_enabled").write_text("always [inherit] within_size advise never\n")
    assert doctor._huge_pages(tmp_path).ok is ok
    (size / "shmem_enabled").write_text("[always] inherit within_size advise never\n")
    check = doctor._huge_pages(tmp_path)
    assert not check.ok
    assert f"echo never > {size}/shmem_enabled" in check.advice


def test_kernel_without_huge_pages(tmp_path: Path) -> None:
    assert doctor._huge_pages(tmp_path / "absent").ok


def test_room(tmp_path: Path) -> None:
    assert doctor._room("here", lambda: tmp_path, 1, "VARIABLE").ok
    full = doctor._room("here", lambda: tmp_path, 1 << 60, "VARIABLE")
    assert not full.ok
    assert "VARIABLE" in full.advice

    def not_ours() -> Path:
        raise HostError("/x: belongs to user 5", "choose another place")

    refused = doctor._room("here", not_ours, 1, "VARIABLE")
    assert (refused.ok, refused.found, refused.advice) == (False, "/x: belongs to user 5", "choose another place")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give up privileges")
def test_what_an_ordinary_user_lacks_is_told_with_what_works_without_it(tmp_path: Path) -> None:
    """The same checks, in a process that has no privilege left."""
    tmp_path.chmod(0o777)
    program = (
        "import os, sys; from pathlib import Path; from hva_host.privileges import privileges\n"
        "import resource; resource.setrlimit(resource.RLIMIT_MEMLOCK, (8 << 20, 8 << 20))\n"
        "os.setgroups([]); os.setresgid(4321, 4321, 4321); os.setresuid(4321, 4321, 4321)\n"
        "[print(*each, sep='|') for each in privileges(lambda: Path(sys.argv[1]))]"
    )
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        Path(folder).chmod(0o777)
        done = subprocess.run([sys.executable, "-c", program, folder], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    found = {words[0]: words for words in (line.split("|") for line in done.stdout.splitlines())}
    assert found["user"][2] == "ordinary user 4321"
    assert found["locked memory"][1] == found["last for the OOM killer"][1] == "False"
    assert "limit 8.0 MiB: pagers are not locked" in found["locked memory"][2]
    assert found["read leases on layers"][1] == "True"
    for words in found.values():
        assert (words[1] == "True") == (words[3] == "")
    before = Path("/proc/self/oom_score_adj").read_text()
    privileges(lambda: tmp_path)
    assert Path("/proc/self/oom_score_adj").read_text() == before


@pytest.mark.parametrize(("scope", "held"), [("0", True), ("1", True), ("2", None), ("3", False)])
def test_yama(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scope: str, held: bool | None) -> None:
    (tmp_path / "scope").write_text(scope)
    monkeypatch.setattr("hva_host.privileges._YAMA", tmp_path / "scope")
    found = next(each for each in privileges(lambda: tmp_path) if "ptrace" in each.name)
    assert found.held == (os.geteuid() == 0 if held is None else held)
    assert found.needed is not found.held
