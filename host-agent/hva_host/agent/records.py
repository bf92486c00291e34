"""What is kept of a running VM in its runtime directory, so that another host agent can take it over.

``RUNTIME/locks/NAME`` is held (a POSIX record lock, which goes with its process) by the one host agent that owns the
VM; lock files are never deleted, so that two who open one always mean the same file. ``RUNTIME/vms/NAME/vm.json`` is
replaced, never rewritten in place.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from hva_host.agent.layer_watch import LayerContent
from hvaqemu.config import VmConfig
from hvaqemu.errors import ConfigError, HostError
from hvaqemu.paths import private_folder, state_dir

_RECORD = "vm.json"


class VmRecord(BaseModel):
    """A running VM."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    config: VmConfig
    qemu_pid: int
    #: Clock ticks after boot; with the pid it names a process for ever.
    qemu_start_time: int
    #: Image and index of every layer.
    layers: tuple[tuple[Path, Path], ...]
    #: What each of them held when it was first matched against, in the same order.
    contents: tuple[LayerContent, ...]
    #: The guest was stopped for a hold, by us: whoever ends the hold lets it go on.
    paused_for_hold: bool = False
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
        locks = runtime / "locks"
        try:
            locks.mkdir(mode=0o700, exist_ok=True)
            self._lock = os.open(locks / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise HostError(f"{locks / name}: {error.strerror}") from error
        try:
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self.release()
            raise ConfigError(
                f"VM {name}: the name is taken by a VM that another hvaqemu runs", "choose another name"
            ) from error
        try:
            private_folder(self.path)
        except OSError as error:
            self.release()
            raise HostError(f"{self.path}: {error.strerror}") from error

    @property
    def disks(self) -> Path:
        return disks_of(self.name)

    def load(self) -> VmRecord | None:
        """The VM that was started in here, if one was.

        :raise HostError: there is a record that this version can not read; its VM may well run.
        """
        path = self.path / _RECORD
        try:
            return VmRecord.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValidationError) as error:
            hint = "end its QEMU with the hvaqemu that started it"
            raise HostError(f"{path}: not a record of this version of hvaqemu", hint) from error

    def store(self, record: VmRecord) -> None:
        """Replace the record.

        :raise HostError: no room.
        """
        scratch = self.path / f"{_RECORD}.new"
        try:
            scratch.touch(mode=0o600)
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
            private_folder(self.disks)
        except OSError as error:
            raise HostError(f"{self.disks}: {error.strerror}") from error

    def remove(self) -> None:
        """Delete the VM's files, disks included, and give the name free. Once only; later calls do nothing."""
        if self._lock < 0:
            return
        shutil.rmtree(self.disks, ignore_errors=True)
        shutil.rmtree(self.path, ignore_errors=True)
        self.release()

    def release(self) -> None:
        """Give up ownership; the VM goes on."""
        lock, self._lock = self._lock, -1
        if lock >= 0:
            os.close(lock)


def names(runtime: Path) -> list[str]:
    """Names that have a directory, running or not."""
    try:
        return sorted(entry.name for entry in (runtime / "vms").iterdir() if entry.is_dir())
    except FileNotFoundError:
        return []
