"""What is kept of a running VM in its runtime directory, so that another host agent can take it over.

``RUNTIME/locks/NAME`` is held (a POSIX record lock, which goes with its process) by the one host agent that owns the
VM; lock files are never deleted, so that two who open one always mean the same file. ``RUNTIME/vms/NAME/vm.json`` is
replaced, never rewritten in place.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from contextlib import suppress
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from hva_host.agent.chain import Chain, Merge
from hva_host.agent.layer_watch import LayerContent
from hva_host.agent.model import NetworkStatus
from hvaqemu.config import VmConfig
from hvaqemu.errors import ConfigError, HostError
from hvaqemu.paths import private_folder, state_dir
from hvaqemu.qemu.command import ROOT_NODE

_RECORD = "vm.json"
#: Its being there says that the disk is to be kept.
_KEPT = "kept.json"


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
    #: The VM's own disks; none: an earlier version of hvaqemu started it, and they can not be frozen.
    chains: tuple[Chain, ...] = ()
    merging: Merge | None = None
    #: Merged files that pages may still depend on.
    retired: tuple[Path, ...] = ()
    network: NetworkStatus | None = None
    #: The guest was stopped for a hold, by us: whoever ends the hold lets it go on.
    paused_for_hold: bool = False
    #: That policy has the balloon keep from the guest; given back when the host has it again.
    ballooned_bytes: int = 0
    pager_restarts: int = 0
    pager_pause_s: float = 0.0


class KeptDisk(BaseModel):
    """A root disk that outlives its VM. Beside the disk's files, so that it is there as long as they are."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    chain: Chain
    #: What the image below held.
    base: LayerContent


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

    def store(self, record: VmRecord, *, keep: bool = False) -> None:
        """Replace the record.

        :param keep: see that the root disk is kept as the record has it.
        :raise HostError: no room.
        """
        _replace(self.path / _RECORD, record.model_dump_json())
        root = next((chain for chain in record.chains if chain.disk == ROOT_NODE), None)
        if keep and root is not None:
            _replace(self.disks / _KEPT, KeptDisk(chain=root, base=record.contents[0]).model_dump_json())

    def make_disks(self, keep: Chain | None = None) -> None:
        """A directory for the VM's disks, with nothing in it but the files of a kept one and their indexes.

        :raise HostError: it can not be made.
        """
        try:
            private_folder(self.disks)
            names = {path.name for path in keep.files} | {_KEPT} if keep is not None else set()
            for path in self.disks.iterdir():
                if path.name not in names and not (path.suffix == ".idx" and _indexed(path) in names):
                    path.unlink()
        except OSError as error:
            raise HostError(f"{self.disks}: {error.strerror}") from error

    @property
    def keeps(self) -> bool:
        """Is the VM's root disk to outlive it?"""
        return (self.disks / _KEPT).exists()

    def kept(self) -> KeptDisk | None:
        """The root disk that an earlier VM of this name left, if it was to be kept.

        :raise HostError: there is one that this version can not read.
        """
        path = self.disks / _KEPT
        try:
            return KeptDisk.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValidationError) as error:
            hint = f"'hvaqemu down {self.name} --delete-disks' deletes it"
            raise HostError(f"{path}: not a record of this version of hvaqemu", hint) from error

    def remove(self, keep: bool | None = None) -> None:
        """Delete the VM's files and give the name free. Once only; later calls do nothing.

        :param keep: keep its root disk; None: if it was to be kept.
        """
        if self._lock < 0:
            return
        if self.keeps if keep is None else keep:
            # What was swapped out, and what was merged away, is of no use without the guest.
            with suppress(HostError):
                kept = self.kept()
                self.make_disks(kept.chain.without_qemu() if kept is not None else None)
        else:
            shutil.rmtree(self.disks, ignore_errors=True)
        shutil.rmtree(self.path, ignore_errors=True)
        self.release()

    def release(self) -> None:
        """Give up ownership; the VM goes on."""
        lock, self._lock = self._lock, -1
        if lock >= 0:
            os.close(lock)


def _replace(path: Path, text: str) -> None:
    scratch = path.with_name(f"{path.name}.new")
    try:
        scratch.touch(mode=0o600)
        scratch.write_text(text)
        scratch.replace(path)
    except OSError as error:
        raise HostError(f"{path.parent}: {error.strerror}") from error


def _indexed(index: Path) -> str:
    """The name of the file that an index is of: "root.qcow2.idx" is of "root.qcow2"."""
    return index.stem


def names(runtime: Path) -> list[str]:
    """Names that have a directory, running or not."""
    try:
        return sorted(entry.name for entry in (runtime / "vms").iterdir() if entry.is_dir())
    except FileNotFoundError:
        return []
