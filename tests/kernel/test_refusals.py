"""QEMU processes that can not be paged safely, and who may page whose; by real processes, asked through /proc alone."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hva_host.memory.backing import Backing
from hva_host.pager import refusals
from hva_host.pager.process_files import descriptors
from hvaqemu.errors import RefusedError
from tests.kernel.harness import PAGES, Guest
from tests.kernel.unfit import NOBODY
from tests.privileged import HostSettings

#: Enough for a huge page, wherever the mapping begins.
HUGE_PAGES = 2048
_TRACER = "+sys_ptrace,+dac_read_search"

ATTACH = """
import os, sys
from hva_host.pager.attach import attach
from hva_host.pager.sources import Sources
from hvaqemu.errors import HvaError
pid = int(sys.argv[1])
try:
    pidfd = os.pidfd_open(pid)
    attach(pid, pidfd, Sources(pid, pidfd))
except HvaError as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""

root_only = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to be somebody else")


@contextmanager
def unfit(*ways: str, pages: int = PAGES) -> Iterator[int]:
    """The pid of a child that is unfit in these ways."""
    with subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("unfit.py")), str(pages), *ways],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as child:
        try:
            assert child.stdout is not None
            assert child.stdout.readline(), "the child did not come up"
            yield child.pid
        finally:
            child.kill()


def attached(pid: int) -> str:
    """What a pager process says of this QEMU; "": it attached."""
    done = subprocess.run(
        [sys.executable, "-c", ATTACH, str(pid)], capture_output=True, text=True, timeout=30, check=False
    )
    return done.stderr.strip()


def attached_as(uid: int, pid: int, *, may_trace: bool = False) -> str:
    """The same by another user."""
    wrapper = ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups"]
    if may_trace:
        wrapper += [f"--inh-caps={_TRACER}", f"--ambient-caps={_TRACER}"]
    done = subprocess.run(
        [*wrapper, sys.executable, "-c", ATTACH, str(pid)], capture_output=True, text=True, timeout=30, check=False
    )
    return done.stderr.strip()


@contextmanager
def ram_of(pid: int) -> Iterator[Backing]:
    number = next(number for number, link in descriptors(pid).items() if "memory-backend" in link)
    backing = Backing(os.open(f"/proc/{pid}/fd/{number}", os.O_RDWR))
    try:
        yield backing
    finally:
        backing.close()


def test_a_fit_one_is_attached_to() -> None:
    with unfit() as pid:
        assert attached(pid) == ""


@pytest.mark.parametrize(
    ("way", "reason"),
    [
        ("huge", "may get huge pages"),
        ("private", "mapped privately"),
        ("twice", "mapped in several places"),
        ("part", "mapped only in part"),
        ("second", "several /memfd:memory-backend-memfd"),
    ],
)
def test_ram_of_another_kind_is_refused(way: str, reason: str) -> None:
    with unfit(way) as pid:
        said = attached(pid)
    assert said.startswith("RefusedError: ")
    assert reason in said


def test_ram_of_hugetlb_pages_is_refused() -> None:
    try:
        os.close(os.memfd_create("probe", os.MFD_HUGETLB))
    except OSError as error:
        pytest.skip(f"no hugetlb here: {error}")
    pool = Path("/proc/sys/vm/nr_hugepages")
    before = pool.read_text()
    try:
        try:
            pool.write_text(str(int(before) + 4))
        except OSError as error:
            pytest.skip(f"no huge pages can be set aside: {error}")
        if int(pool.read_text()) < int(before) + 4:
            pytest.skip("the host has no room for four huge pages")
        with unfit("hugetlb", pages=HUGE_PAGES) as pid:
            assert "huge pages (hugetlb)" in attached(pid)
    finally:
        pool.write_text(before)


# Whoever changes the host's settings waits for all modules that depend on them, and waiting counts.
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("setting", ["advise", "always"])
def test_huge_pages_really_behind_ram_are_refused(host_settings: HostSettings, setting: str) -> None:
    with host_settings.shmem_enabled("always"):
        # Whether they are there is a matter of the past: the setting of now is not asked.
        with unfit("huge", pages=HUGE_PAGES) as pid, ram_of(pid) as ram:
            figures = dict(refusals._smaps(pid, os.fstat(ram.fd)))
            if not figures["ShmemPmdMapped"]:
                pytest.skip("the kernel found no huge page to give")
            with host_settings.shmem_enabled(setting):
                with pytest.raises(RefusedError, match="may get huge pages"):
                    refusals.refuse(pid, ram)
                with pytest.raises(RefusedError, match=r"huge pages are behind \d+ MiB"):
                    refusals._refuse_huge_pages(pid, os.fstat(ram.fd))
                assert "may get huge pages" in attached(pid)
        with Guest(HUGE_PAGES) as guest:
            for pfn in range(0, HUGE_PAGES, 64):
                guest.write(pfn, "x")
            assert dict(refusals._smaps(guest.child.pid, os.fstat(guest.ram.backing.fd)))["ShmemPmdMapped"] == 0
            assert guest.ram.backing.used_bytes() == HUGE_PAGES // 64 * 4096
            refusals.refuse_at_attach(guest.child.pid, guest.ram.backing)


def test_ram_that_another_process_maps_is_refused() -> None:
    with unfit() as pid, ram_of(pid) as ram:
        refusals.refuse_at_attach(pid, ram)
        with mmap.mmap(ram.fd, 4096):
            with pytest.raises(RefusedError, match=rf"\(process {os.getpid()}\)"):
                refusals.refuse_at_attach(pid, ram)
            assert f"(process {os.getpid()})" in attached(pid)
        refusals.refuse_at_attach(pid, ram)


def test_ram_that_was_plugged_in_stops_the_next_epoch(guest: Guest) -> None:
    refusals.refuse(guest.child.pid, guest.ram.backing)
    with unfit("second") as pid, ram_of(pid) as ram, pytest.raises(RefusedError, match="several RAM memfds"):
        refusals.refuse(pid, ram)


def test_a_device_that_pins_ram_is_told_by_its_descriptor() -> None:
    for link, reason in {
        "/dev/vfio/12": "VFIO",
        "anon_inode:[vfio-device]": "VFIO",
        "anon_inode:vfio-group": "VFIO",
        "/dev/iommu": "iommufd",
        "/dev/vhost-net": "kernel vhost",
        "/dev/vhost-vsock": "kernel vhost",
        "/dev/vhost-vdpa-0": "vDPA",
        "/dev/infiniband/uverbs0": "RDMA",
        "/dev/udmabuf": "udmabuf",
    }.items():
        assert refusals._pinned({3: "/dev/null", 4: link}).startswith(f"{link}: {reason}")
    for link in ("/dev/kvm", "anon_inode:kvm-vm", "/dev/net/tun", "/home/x/dev/vfio/1", "/memfd:vfio (deleted)"):
        assert refusals._pinned({3: link}) == ""


@root_only
def test_root_pages_anybodys() -> None:
    with unfit("nobody") as pid:
        assert attached(pid) == ""


@root_only
def test_a_user_pages_its_own() -> None:
    with unfit("nobody") as pid:
        assert attached_as(NOBODY, pid) == ""


@root_only
@pytest.mark.parametrize("owner", ["root", "nobody"])
def test_nobody_else_pages_anything(owner: str) -> None:
    with unfit(*(["nobody"] if owner == "nobody" else [])) as pid:
        stranger = NOBODY - 1
        said = attached_as(stranger, pid)
        assert said.startswith("HostError: ")
        assert "not yours to attach to" in said
        assert "use the user that runs QEMU, or root" in said
        # One that may trace every process gets further, and is told no all the same.
        said = attached_as(stranger, pid, may_trace=True)
        assert said.startswith("RefusedError: ")
        assert "another user's" in said
