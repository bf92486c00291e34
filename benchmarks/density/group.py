"""A control group (version 1) with a memory limit, and what it says of the processes in it. Sizes are bytes."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from hva_host.agent import accounts
from hvaqemu.errors import HostError

_MEMORY = Path("/sys/fs/cgroup/memory")
_END_SECONDS = 30.0


@dataclass(frozen=True)
class Usage:
    """What the group holds.

    :ivar shared: guest RAM and stores, and whatever else lies in memory files.
    :ivar anonymous: of all processes: QEMU's own memory, pagers, the host agent.
    :ivar files: page cache: images, overlays, programs; the kernel drops it when it must.
    :ivar kernel: of the processes and files: page tables, sockets.
    :ivar kills: processes that the kernel has killed because the limit was reached.
    """

    shared: int
    anonymous: int
    files: int
    kernel: int
    kills: int

    @property
    def held(self) -> int:
        """What can not be dropped."""
        return self.shared + self.anonymous + self.kernel


class Group:
    """One control group."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def usage(self) -> Usage:
        """What it holds now."""
        stat = _numbers(self.path / "memory.stat")
        shared = stat["shmem"]
        return Usage(
            shared=shared,
            anonymous=stat["rss"],
            files=stat["cache"] - shared,
            kernel=max(0, int((self.path / "memory.usage_in_bytes").read_text()) - stat["cache"] - stat["rss"]),
            kills=_numbers(self.path / "memory.oom_control").get("oom_kill", 0),
        )

    def cpu_seconds(self) -> float:
        """Processor time that the processes now in it have used."""
        return sum(accounts.cpu_seconds(pid) for pid in self._pids())

    def join(self) -> None:
        """Have this process, and all it starts, be in it."""
        (self.path / "cgroup.procs").write_text(str(os.getpid()))

    def end(self) -> None:
        """Kill what is still in it, and remove it.

        :raise HostError: it can not be removed.
        """
        deadline = time.monotonic() + _END_SECONDS
        while True:
            for pid in self._pids():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            try:
                self.path.rmdir()
                return
            except OSError as error:
                if time.monotonic() > deadline:
                    raise HostError(f"{self.path}: can not be removed: {error.strerror}") from error
            time.sleep(0.1)

    def _pids(self) -> list[int]:
        return [int(pid) for pid in (self.path / "cgroup.procs").read_text().split()]


@contextmanager
def limited(limit: int | None) -> Iterator[Group]:
    """A group whose processes may have ``limit`` bytes; None: as much as there is.

    :raise HostError: this host lets us make none.
    """
    group = Group(_MEMORY / f"hva-density-{os.getpid()}")
    try:
        group.path.mkdir()
        if limit is not None:
            (group.path / "memory.limit_in_bytes").write_text(str(limit))
    except OSError as error:
        raise HostError(
            f"{group.path}: {error.strerror}; density needs root and control groups of version 1"
        ) from error
    try:
        yield group
    finally:
        group.end()


def _numbers(path: Path) -> dict[str, int]:
    return {key: int(value) for key, value in (line.split() for line in path.read_text().splitlines())}
