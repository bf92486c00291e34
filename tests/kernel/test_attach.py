"""Attaching: by pid, exclusively, the same way after a crash; and what is refused."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hva_host.memory.ledger import ZERO_ENTRY, Ledger
from hva_host.pager.attach import attach
from hva_host.pager.membership import Member
from hva_host.pager.refusals import pinned_by
from hva_host.pager.sources import Sources
from hvaqemu.errors import HvaError, PeerLost, RefusedError
from hvaqemu.pages import Run
from tests.kernel.harness import PAGES, Guest, block, crc, make_layer

ATTACH = """
import os, sys
from hva_host.pager.attach import attach
from hva_host.pager.sources import Sources
from hvaqemu.errors import HvaError
try:
    pid = int(sys.argv[1])
    pidfd = os.pidfd_open(pid)
    attach(pid, pidfd, Sources(pid, pidfd))
except HvaError as error:
    sys.exit(str(error))
"""


def test_two_pagers_never_serve_one_vm(guest: Guest) -> None:
    second = subprocess.run([sys.executable, "-c", ATTACH, str(guest.child.pid)], capture_output=True, text=True)
    assert "another pager serves this VM" in second.stderr
    assert second.returncode == 1


def test_a_second_attach_finds_the_ledger_and_delivers_what_was_read_and_not_answered(tmp_path: Path) -> None:
    with Guest() as guest:
        blocks = [block(i) for i in range(4)]
        guest.ram.add_layer(make_layer(tmp_path, blocks))
        for pfn, data in enumerate(blocks):
            guest.fill(pfn, data)
        guest.run(guest.begin(dict.fromkeys(range(4), Member.COPY)))
        guest.write(20, "here")
        guest.ram.ledger.entries[20] = ZERO_ENTRY
        guest.ram.protect(Run(20, 1))
        guest.send("r 2")
        deadline = time.monotonic() + 10
        while not (faults := guest.ram.uffd.read()):
            assert not guest.answered(0.005)
            assert time.monotonic() < deadline, "no fault"
        assert len(faults) == 1, "read, and the pager dies before it answers"
        layer = next(iter(guest.ram.layers.values()))
        trusted = [(layer.path, Path(layer.record().index_path))]
        guest.ram = attach(guest.child.pid, guest.pidfd, Sources(guest.child.pid, guest.pidfd, trusted))
        guest.refaults._ram = guest.ram
        assert guest.ram.layers
        assert int(guest.reply().split()[1]) == crc(blocks[2])
        assert guest.ram.ledger.entries[20] == 0, "presence wins"
        guest.send("w 20 unprotected")
        assert guest.answered(5)
        assert guest.reply() == "ok"


def test_a_process_without_the_shim_is_refused() -> None:
    child = subprocess.Popen(["sleep", "60"])
    try:
        with pytest.raises(RefusedError, match="without the shim"):
            attach(child.pid, (pidfd := os.pidfd_open(child.pid)), Sources(child.pid, pidfd))
    finally:
        child.kill()
        child.wait()


def test_a_process_that_is_gone() -> None:
    child = subprocess.Popen(["sleep", "60"])
    pidfd = os.pidfd_open(child.pid)
    child.kill()
    child.wait()
    with pytest.raises((PeerLost, HvaError)):
        attach(child.pid, pidfd, Sources(child.pid, pidfd))


def test_a_ledger_of_another_version_is_refused(guest: Guest) -> None:
    os.pwrite(guest.ram.ledger.fd, (99).to_bytes(8, "little"), 8)
    second = subprocess.run([sys.executable, "-c", ATTACH, str(guest.child.pid)], capture_output=True, text=True)
    assert second.returncode == 1
    with pytest.raises(RefusedError, match="version 99"):
        Ledger(os.dup(guest.ram.ledger.fd), PAGES, os.fstat(guest.ram.backing.fd).st_ino)


def test_a_device_that_pins_ram_is_seen(tmp_path: Path) -> None:
    child = subprocess.Popen(["sleep", "60"])
    try:
        assert pinned_by(child.pid) == ""
    finally:
        child.kill()
        child.wait()
    if Path("/dev/vhost-net").exists():
        with Path("/dev/vhost-net").open("rb"):
            assert "vhost" in pinned_by(os.getpid())


def test_the_ledger_lives_as_long_as_the_guest(guest: Guest) -> None:
    guest.run(guest.begin({1: Member.COPY}))
    guest.child.kill()
    with pytest.raises(PeerLost):
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline:
            guest.refaults.fill(1, 1)
            guest.ram.unprotect(Run(0, 1))
