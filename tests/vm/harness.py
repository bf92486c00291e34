"""Real guests for tests: started, spoken to, looked at from both sides, and proven gone afterwards."""

from __future__ import annotations

import asyncio
import os
import re
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from hva_host.agent.events import what_is_wrong
from hva_host.agent.fleet import Fleet
from hva_host.agent.model import EpochStats, ExecResult
from hva_host.agent.vm import Vm
from hva_host.memory.backing import Backing
from hvaqemu.config import ExtraDisk, VmConfig
from hvaqemu.errors import HvaError
from hvaqemu.paths import runtime_dir, state_dir
from hvaqemu.reclaim_config import ReclaimState
from hvaqemu.units import MiB
from tests.vm.programs import bundle, start_command

#: Far beyond what an idle machine needs; these tests also run beside builds.
BOOT_SECONDS = 240.0
STEP_SECONDS = 120.0

UNUSED, VOLATILE = ReclaimState.UNUSED, ReclaimState.VOLATILE
BOTH = (UNUSED, VOLATILE)

#: What a guest's kernel says when its memory is not what it was.
COMPLAINTS = re.compile(
    r"BUG|Oops|[Bb]ad page|[Cc]orrupt|Unable to handle|list_(add|del)|User process fault|Kernel panic"
    r"|EXT4-fs (error|warning)|I/O error|[Bb]ad checksum"
)
#: Prints a checksum of many files of the image.
TREE = "find /etc /usr/sbin /usr/bin/[a-m]* -xdev -type f -print0 | sort -z | xargs -0 md5sum | md5sum"


class Guest:
    """A running VM, and what tests do with one."""

    def __init__(self, fleet: Fleet, vm: Vm, events: list[tuple[str, dict[str, Any]]]) -> None:
        self.fleet = fleet
        self.vm = vm
        #: Everything the host agent has announced, in order.
        self.events = events
        self.qemu_pid = vm.process.pid

    # From inside the guest

    async def run(self, script: str, timeout: float = STEP_SECONDS) -> str:
        """What a shell script that must succeed prints."""
        done = await self.vm.execute(["sh", "-c", script], timeout=timeout)
        assert done.ok, f"{script}: {done}"
        return done.stdout.decode()

    async def python(self, source: str, *arguments: object) -> ExecResult:
        """Run a few lines of Python in the guest, which must succeed."""
        return await self._run_python(["python3", "-B", "-", *map(str, arguments)], source.encode(), STEP_SECONDS)

    async def program(
        self, name: str, *arguments: object, timeout: float = STEP_SECONDS, check: bool = True
    ) -> ExecResult:
        """Run one of the programs for guests."""
        return await self._run_python(start_command(name, *arguments), bundle(), timeout, check)

    async def _run_python(self, argv: list[str], stdin: bytes, timeout: float, check: bool = True) -> ExecResult:
        done = await self.vm.execute(argv, timeout=timeout, stdin=stdin)
        assert done.ok or not check, f"{done.exit_status} {done.stderr.decode(errors='replace')}"
        return done

    async def tree_digest(self) -> str:
        """A checksum of many files of the image, read through the guest's page cache."""
        return await self.run(TREE)

    async def complaints(self) -> list[str]:
        """Lines of the guest kernel's log that no healthy guest has."""
        return [line for line in (await self.run("dmesg")).splitlines() if COMPLAINTS.search(line)]

    async def boot_id(self) -> str:
        """Another one after each boot."""
        return await self.run("cat /proc/sys/kernel/random/boot_id")

    async def rebooted(self, boot: str) -> None:
        """Wait until the guest serves after another boot than ``boot``."""
        async with asyncio.timeout(BOOT_SECONDS):
            while True:
                try:
                    await self.vm.guest.wait_connected(BOOT_SECONDS)
                    if await self.boot_id() != boot:
                        return
                except HvaError:
                    # Its agent went down with it.
                    await asyncio.sleep(0.1)

    # From outside

    def presence(self) -> NDArray[np.bool_]:
        """Which pages of guest RAM occupy host memory, asked of the kernel and not of the pager."""
        for entry in Path(f"/proc/{self.qemu_pid}/fd").iterdir():
            if os.readlink(entry).startswith("/memfd:memory-backend-memfd"):  # noqa: PTH115
                backing = Backing(os.open(entry, os.O_RDONLY | os.O_CLOEXEC))
                try:
                    return backing.presence(0, backing.pages)
                finally:
                    backing.close()
        raise AssertionError("QEMU has no RAM")

    def classes(self) -> NDArray[np.uint8]:
        """The guest's newest report, a class-map byte a page."""
        report = self.vm.reclaimer.report
        assert report is not None
        return report.classes

    def protection(self, patch: pytest.MonkeyPatch, seconds: float) -> None:
        """Pages stay protected for so long at the most, until ``patch`` is undone."""
        patch.setattr(self.vm.reclaimer._driver, "_protection", seconds)

    async def epoch(self, *states: ReclaimState) -> EpochStats:
        """Run exactly one epoch."""
        return (await self.vm.reclaim(states or BOTH, epochs=1)).epochs[0]

    def heard(self, event: str) -> int:
        """How often the host agent announced ``event``."""
        return sum(name == event for name, _ in self.events)


@asynccontextmanager
async def running_guest(
    name: str, *, memory: int = 512 * MiB, cpus: int = 2, extra_disks: Sequence[Path | ExtraDisk] = (), **more: Any
) -> AsyncIterator[Guest]:
    """A VM that runs; whatever the test does to it, nothing may be left of it afterwards.

    :param more: further keys of its config.
    """
    events: list[tuple[str, dict[str, Any]]] = []
    fleet = Fleet(runtime_dir(), embedded=True, on_event=lambda event, data: events.append((event, data)))
    disks = tuple(ExtraDisk(path=disk) if isinstance(disk, Path) else disk for disk in extra_disks)
    config = VmConfig(
        name=name, memory=memory, cpus=cpus, extra_disks=disks, allow_exec=True, boot_timeout=BOOT_SECONDS, **more
    )
    try:
        vm = await fleet.up(config, print)
        yield Guest(fleet, vm, events)
    finally:
        await fleet.close()
    await nothing_left(name)
    assert not [what for event, data in events if (what := what_is_wrong(event, data))]


async def nothing_left(name: str) -> None:
    """See that a VM is gone: its processes, its runtime directory, its disks."""
    await until(lambda: not processes_of(name), STEP_SECONDS, f"processes of VM {name}: {processes_of(name)}")
    assert not os.path.lexists(runtime_dir() / "vms" / name)
    assert not os.path.lexists(state_dir() / "vms" / name)


def processes_of(name: str) -> list[str]:
    """Command lines of living processes that have to do with the VM: whose arguments or open files name its folder."""
    folder = os.fsencode(runtime_dir() / "vms" / name) + b"/"
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and int(entry.name) != os.getpid():
            # It may end while it is looked at.
            with suppress(OSError):
                words = (entry / "cmdline").read_bytes()
                said = [words, *(os.fsencode(link.readlink()) for link in (entry / "fd").iterdir())]
                if any(folder in text for text in said):
                    found.append(words.replace(b"\0", b" ").decode(errors="replace")[:100])
    return found


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and waits to be collected does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


async def until(condition: Callable[[], object], seconds: float, what: str) -> None:
    """Wait for something that no event tells of."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"still waiting after {seconds:g} s for {what}")
        await asyncio.sleep(0.05)
