"""A host agent as users have it: a process of its own that commands start when they need it, and that can be killed.

Its directories are its own, and so is every process that has to do with them.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from hva_host.agent.background import connect_or_start
from hva_host.agent.client import ControlClient
from hva_host.agent.pager_link import PagerLink
from hva_host.agent.pager_process import PAGER_SOCKET
from hva_host.memory.ledger import LEDGER_NAME
from hvaqemu.errors import HvaError
from tests.unit.control_stand_ins import short_folder
from tests.vm.harness import STEP_SECONDS, until

_LEDGER = f"/memfd:{LEDGER_NAME} (deleted)"
#: Pagers have its command line; each names itself.
_PARENT = "hva-pagers"
_SECONDS = 900.0


class Host:
    """The directories, the processes that belong to them, and commands."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.runtime = folder / "r"
        self.state = folder / "s"
        self.environment = {"HVAQEMU_RUNTIME_DIR": str(self.runtime), "HVAQEMU_STATE_DIR": str(self.state)}

    # Commands

    @staticmethod
    def argv(*words: str | Path) -> list[str | Path]:
        """A command line of hvaqemu."""
        return [sys.executable, "-m", "hva_host.cli.main", *words]

    @property
    def full_environment(self) -> dict[str, str]:
        """What commands must find in their environment."""
        return {**os.environ, **self.environment}

    async def command(self, *words: str | Path) -> str:
        """What a command that must succeed prints, typed as a user types it."""
        done = await asyncio.to_thread(
            subprocess.run,
            self.argv(*words),
            capture_output=True,
            env=self.full_environment,
            timeout=_SECONDS,
        )
        assert done.returncode == 0, f"{words}: {done.stderr.decode()}"
        return done.stdout.decode()

    @asynccontextmanager
    async def client(self) -> AsyncIterator[ControlClient]:
        """A connection to the host agent, which is started where there is none: what every command does first."""
        client = await connect_or_start(self.runtime)
        try:
            yield client
        finally:
            await client.close()

    async def pager_status(self, name: str) -> dict[str, Any]:
        """What the pager says of itself; needs no host agent.

        :raise HvaError: it does not answer.
        """
        link = PagerLink(lambda _name, _data: None)
        try:
            await link.connect(self.runtime / "vms" / name / PAGER_SOCKET)
            return dict(await link.call("status"))
        finally:
            await link.close()

    async def connected(self, name: str) -> None:
        """Wait for a guest's agent; a host agent is started where there is none."""
        deadline = time.monotonic() + STEP_SECONDS
        while time.monotonic() < deadline:
            with suppress(HvaError):
                async with self.client() as client:
                    if (await client.status(name)).guest_connected:
                        return
            await asyncio.sleep(0.1)
        pytest.fail(f"{name}: no guest agent")

    # Processes

    def processes(self) -> dict[int, list[bytes]]:
        """Live processes that have to do with the directories, by pid: their command lines."""
        mark = os.fsencode(self.folder) + b"/"
        found = {}
        for process in Path("/proc").iterdir():
            if not process.name.isdigit() or int(process.name) == os.getpid():
                continue
            # It may end while it is looked at.
            with suppress(OSError):
                words = (process / "cmdline").read_bytes()
                if words and (mark in words or mark in (process / "environ").read_bytes()):
                    found[int(process.name)] = words.split(b"\0")[:-1]
        return found

    def agents(self) -> list[int]:
        """The host agent, if there is one, and one that is being started."""
        return [pid for pid, words in self.processes().items() if b"hva_host.cli.main" in words and b"agent" in words]

    def qemu(self) -> int | None:
        """The VM's QEMU. There must be one VM at the most."""
        return next(_qemus(self.processes()), None)

    def pagers(self) -> list[int]:
        """Processes that hold the VM's ledger beside QEMU: the pager, and one that attaches."""
        processes = self.processes()
        qemu = next(_qemus(processes), None)
        ledger = _ledger_of(qemu) if qemu is not None else None
        if ledger is None:
            return []
        return [pid for pid in processes if pid != qemu and _ledger_of(pid) == ledger]

    def pager_parents(self) -> list[int]:
        """What pagers are forked from; also one that was forked this moment."""
        return [
            pid
            for pid, words in self.processes().items()
            if b"hva_host.pager.parent" in words and _name_of(pid) == _PARENT
        ]

    def send(self, pid: int, number: signal.Signals) -> bool:
        """Signal one of these processes; False if it was gone, whoever has its number by now."""
        try:
            descriptor = os.pidfd_open(pid)
        except ProcessLookupError:
            return False
        try:
            # Looked at with the pidfd in hand: it is this process or none.
            if pid not in self.processes():
                return False
            signal.pidfd_send_signal(descriptor, number)
        except ProcessLookupError:
            return False
        finally:
            os.close(descriptor)
        return True

    async def all_gone(self) -> None:
        """End the host agent; then nothing may be left.

        Fails the test if something is.
        """
        await self.command("agent", "--stop")
        await until(lambda: not self.processes(), STEP_SECONDS, f"the end of {self.processes()}")
        for place in (self.runtime / "vms", self.state / "vms"):
            assert not place.exists() or not list(place.iterdir()), f"{place} is not empty"

    def end_everything(self) -> None:
        """For when something went wrong before."""
        deadline = time.monotonic() + 10
        while (left := self.processes()) and time.monotonic() < deadline:
            # The host agents first: they would start other pagers.
            for pid in [*self.agents(), *left]:
                self.send(pid, signal.SIGKILL)
            time.sleep(0.05)


@contextmanager
def own_host() -> Iterator[Host]:
    """A host agent's directories, and whatever belongs to them ended afterwards."""
    with short_folder() as folder:
        host = Host(folder)
        # What finds or starts a host agent in this process must mean the same directories.
        with patch.dict(os.environ, host.environment):
            try:
                yield host
            finally:
                host.end_everything()


def _qemus(processes: dict[int, list[bytes]]) -> Iterator[int]:
    return (pid for pid, words in processes.items() if words[0].startswith(b"qemu-system"))


def _name_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def _ledger_of(pid: int) -> int | None:
    """The inode number of the ledger that a process holds."""
    with suppress(OSError):
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):
                if str(entry.readlink()) == _LEDGER:
                    return entry.stat().st_ino
    return None
