"""What is kept of a running VM in its runtime directory, so that another host agent can take it over.

``RUNTIME/vms/NAME/lock`` is held (a POSIX record lock, which goes with its process) by the one host agent that owns
the VM; ``vm.json`` is replaced, never rewritten in place.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from hvaqemu.config import VmConfig
from hvaqemu.errors import ConfigError, HostError
from hvaqemu.paths import state_dir

_RECORD = "vm.json"
_LOCK = "lock"


class VmRecord(BaseModel):
    """A running VM."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    config: VmConfig
    qemu_pid: int
    #: Clock ticks after boot; with the pid it names a process for ever.
    qemu_start_time: int
    #: Image and index of every layer.
    layers: tuple[tuple[Path, Path], ...]
    pager_restarts: int = 0
    pager_pause_s: float = 0.0


def disks_of(name: str) -> Path:
    """Where a VM's own disks are; on a file system rather than in host memory."""
    return state_dir() / "vms" / name


class VmFolder:
    """One VM's runtime directory, owned by this process while open."""

    def __init__(self, runtime: Path, name: str) -> None:
        """Take ownership; makes the directory where there is none.

        :raise ConfigError: another host agent owns it.
        """
        self.name = name
        self.path = runtime / "vms" / name
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = os.open(self.path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise HostError(f"{self.path}: {error.strerror}") from error
        try:
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock)
            raise ConfigError(
                f"VM {name}: the name is taken by a VM that another hvaqemu runs", "choose another name"
            ) from error

    @property
    def disks(self) -> Path:
        return disks_of(self.name)

    def load(self) -> VmRecord | None:
        """The VM that was started in here, if one was and its record is whole."""
        try:
            return VmRecord.model_validate_json((self.path / _RECORD).read_bytes())
        except (FileNotFoundError, ValidationError):
            return None

    def store(self, record: VmRecord) -> None:
        """Replace the record.

        :raise HostError: no room.
        """
        scratch = self.path / f"{_RECORD}.new"
        try:
            scratch.write_text(record.model_dump_json())
            scratch.replace(self.path / _RECORD)
        except OSError as error:
            raise HostError(f"{self.path}: {error.strerror}") from error

    def make_disks(self) -> None:
        """An empty directory for the VM's disks, in place of what a dead VM left.

        :raise HostError: it can not be made.
        """
        try:
            shutil.rmtree(self.disks, ignore_errors=True)
            self.disks.mkdir(mode=0o700, parents=True)
        except OSError as error:
            raise HostError(f"{self.disks}: {error.strerror}") from error

    def remove(self) -> None:
        """Delete the VM's files, disks included, and give the name free."""
        shutil.rmtree(self.disks, ignore_errors=True)
        # The lock goes last, so that nobody takes a directory that is half gone.
        for entry in self.path.iterdir():
            if entry.name != _LOCK:
                entry.unlink(missing_ok=True)
        (self.path / _LOCK).unlink(missing_ok=True)
        self.path.rmdir()
        os.close(self._lock)

    def release(self) -> None:
        """Give up ownership; the VM goes on."""
        os.close(self._lock)


def names(runtime: Path) -> list[str]:
    """Names that have a directory, running or not."""
    try:
        return sorted(entry.name for entry in (runtime / "vms").iterdir() if entry.is_dir())
    except FileNotFoundError:
        return []
