"""The shim, preloaded into a child of ours that is not QEMU."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hva_host.shim import ensure_shim
from hvaqemu.errors import HostError

pytestmark = pytest.mark.kernel

SYS_PIDFD_GETFD = 438
UFFDIO_API = 0xC018AA3F
UFFD_API = 0xAA
FEATURE_PAGEFAULT_FLAG_WP = 1 << 0
FEATURE_MISSING_SHMEM = 1 << 5
FEATURE_WP_HUGETLBFS_SHMEM = 1 << 12
NEEDED = FEATURE_PAGEFAULT_FLAG_WP | FEATURE_MISSING_SHMEM | FEATURE_WP_HUGETLBFS_SHMEM


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HVAQEMU_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield ensure_shim()


def links(pid: int) -> dict[int, str]:
    return {int(entry.name): str(entry.readlink()) for entry in Path(f"/proc/{pid}/fd").iterdir()}


@pytest.fixture
def child(shim: Path) -> Iterator[int]:
    """The pid of a shell that is past its constructors and waits in a builtin."""
    environment = {"PATH": os.defpath, "LD_PRELOAD": str(shim), "HVA_SHIM": "1"}
    with subprocess.Popen(
        ["sh", "-c", "echo ready; read line"], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as shell:
        try:
            assert shell.stdout is not None
            assert shell.stdout.readline() == b"ready\n"
            yield shell.pid
        finally:
            shell.kill()


def test_descriptors_are_in_the_childs_table(child: int) -> None:
    found = list(links(child).values())
    assert found.count("anon_inode:[userfaultfd]") == 1
    assert found.count("/memfd:hva-ledger (deleted)") == 1
    assert found.count("/memfd:hva-store (deleted)") == 1
    assert "/dev/userfaultfd" not in found


def test_descriptors_close_on_exec(child: int) -> None:
    for number, link in links(child).items():
        if "userfaultfd" in link or "hva-" in link:
            info = Path(f"/proc/{child}/fdinfo/{number}").read_text()
            match = re.search(r"^flags:\s*([0-7]+)", info, re.MULTILINE)
            assert match is not None
            assert int(match[1], 8) & os.O_CLOEXEC


def test_userfaultfd_taken_by_pid_has_what_the_pager_needs(child: int) -> None:
    number = next(number for number, link in links(child).items() if link == "anon_inode:[userfaultfd]")
    pidfd = os.pidfd_open(child)
    libc = ctypes.CDLL(None, use_errno=True)
    taken = libc.syscall(SYS_PIDFD_GETFD, pidfd, number, 0)
    os.close(pidfd)
    assert taken >= 0, os.strerror(ctypes.get_errno())
    try:
        request = bytearray(struct.pack("=QQQ", UFFD_API, NEEDED, 0))
        fcntl.ioctl(taken, UFFDIO_API, request)
        _, features, _ = struct.unpack("=QQQ", request)
        assert features & NEEDED == NEEDED
        with pytest.raises(BlockingIOError):
            os.read(taken, 32)
    finally:
        os.close(taken)


def test_no_huge_pages(child: int) -> None:
    assert re.search(r"^THP_enabled:\s*0$", Path(f"/proc/{child}/status").read_text(), re.MULTILINE)


def test_environment_is_not_inherited(shim: Path) -> None:
    done = subprocess.run(
        ["sh", "-c", "env; ls -l /proc/self/fd"],
        env={"PATH": os.defpath, "LD_PRELOAD": str(shim), "HVA_SHIM": "1"},
        capture_output=True,
        text=True,
        timeout=20,
        check=True,
    )
    assert "LD_PRELOAD" not in done.stdout
    assert "HVA_SHIM" not in done.stdout
    assert "hva-ledger" not in done.stdout


def test_does_nothing_where_it_is_not_meant(shim: Path) -> None:
    done = subprocess.run(
        ["ls", "-l", "/proc/self/fd"],
        env={"PATH": os.defpath, "LD_PRELOAD": str(shim)},
        capture_output=True,
        text=True,
        timeout=20,
        check=True,
    )
    assert "hva-ledger" not in done.stdout
    assert "userfaultfd" not in done.stdout


def test_failure_is_one_line_and_an_exit(shim: Path) -> None:
    """With no descriptors left nothing can be opened, so the program itself must never start."""
    code = (
        "import os, resource, sys\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (4, 4))\n"
        "os.execve('/bin/echo', ['echo', 'started'], {'LD_PRELOAD': sys.argv[1], 'HVA_SHIM': '1'})\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(shim)], capture_output=True, text=True, timeout=20, check=False
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert re.fullmatch(rf"hvaqemu shim: [a-z-]+ ?[a-z-]*: {os.strerror(errno.EMFILE)}\n", done.stderr)


def test_built_once(shim: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HVAQEMU_CACHE_DIR", str(shim.parents[2]))
    before = shim.stat()
    said: list[str] = []
    assert ensure_shim(progress=said.append) == shim
    assert (shim.stat().st_ino, said) == (before.st_ino, [])
    assert [entry.name for entry in shim.parent.iterdir()] == [shim.name]


def test_cache_path_that_ld_preload_can_not_carry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HVAQEMU_CACHE_DIR", str(tmp_path / "a cache"))
    with pytest.raises(HostError, match="HVAQEMU_CACHE_DIR"):
        ensure_shim()


def test_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HVAQEMU_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(HostError, match="install the packages gcc"):
        ensure_shim()
