"""Settings of the host that tests change and put back, and who must not run meanwhile."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

_SHMEM = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")


class HostSettings:
    """One process's part in an agreement of all processes of a test run (pytest-xdist starts several).

    Whoever depends on the host's settings as they are holds a lock together with the others that do; whoever changes
    them waits until it holds the lock alone.

    :param folder: one for all processes.
    """

    def __init__(self, folder: Path) -> None:
        self._lock = (folder / "settings.lock").open("a")
        #: Who is next passes it: else those who come and go together would keep out for ever who wants to be alone.
        self._gate = (folder / "settings.gate").open("a")
        self._alone = False

    def close(self) -> None:
        """Let everybody else have their turn."""
        self._lock.close()
        self._gate.close()

    @contextmanager
    def left_alone(self) -> Iterator[None]:
        """Nobody changes settings inside, but this process itself."""
        self._wait(fcntl.LOCK_SH)
        try:
            yield
        finally:
            fcntl.flock(self._lock, fcntl.LOCK_UN)

    @contextmanager
    def shmem_enabled(self, setting: str) -> Iterator[None]:
        """Another setting for huge pages behind shared memory; put back whatever happens.

        To be used inside :meth:`left_alone`. Skips where the setting is not ours to change.
        """
        try:
            before = next(word[1:-1] for word in _SHMEM.read_text().split() if word.startswith("["))
            # Whether it may be written, before anybody is kept waiting for it.
            _SHMEM.write_text(before)
        except OSError as error:
            pytest.skip(f"{_SHMEM}: {error.strerror}")
        with self._to_oneself():
            _SHMEM.write_text(setting)
            try:
                yield
            finally:
                _SHMEM.write_text(before)

    @contextmanager
    def _to_oneself(self) -> Iterator[None]:
        if self._alone:
            yield
            return
        self._wait(fcntl.LOCK_EX)
        self._alone = True
        try:
            yield
        finally:
            self._alone = False
            self._wait(fcntl.LOCK_SH)

    def _wait(self, how: int) -> None:
        # Holding nothing: two who each waited for the other's end would wait for ever.
        fcntl.flock(self._lock, fcntl.LOCK_UN)
        fcntl.flock(self._gate, fcntl.LOCK_EX)
        try:
            fcntl.flock(self._lock, how)
        finally:
            fcntl.flock(self._gate, fcntl.LOCK_UN)
