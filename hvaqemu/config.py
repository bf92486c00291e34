"""What a user writes about a VM: frozen, strict, the same after a trip through JSON.

Relative paths mean the folder of the file they stand in; :func:`load_vm` makes them absolute.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import (
    AfterValidator,
    Field,
    ModelWrapValidatorHandler,
    RootModel,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)

from hvaqemu import strict_yaml
from hvaqemu.fields import Config, Count, Flag, HostPath, Location, Name, Seconds, Size, Text, absolute, complain
from hvaqemu.image_config import DEFAULT_IMAGE, ImageConfig
from hvaqemu.pages import PAGE_SIZE
from hvaqemu.qemu import user_args
from hvaqemu.qemu.profile import PROFILES, MachineProfile
from hvaqemu.units import GiB, MiB, format_size

FREEZE_AFTER_MIN = 16 * MiB
SWAP_MIN = 16 * MiB

PROTECTION_LEAST = 0.05


class Accelerator(StrEnum):
    """How QEMU runs the guest's processors."""

    TCG = "tcg"
    KVM = "kvm"


def _image_value(value: object, _union: ValidatorFunctionWrapHandler) -> object:
    # Not left to a union: its complaint about a wrong key inside would begin with "should be text".
    if isinstance(value, Mapping | ImageConfig):
        return ImageConfig.model_validate(value)
    if not isinstance(value, str) or not value or "\0" in value:
        raise ValueError("must be the name of an image, the path of a file that describes one, or a description")
    return value


class ExtraDisk(Config):
    """A further raw disk of the guest."""

    path: HostPath
    read_only: Flag = False
    #: Past the host's page cache (QEMU's cache.direct=on).
    direct: Flag = False


class StoreConfig(Config):
    """The compressed store of the VM's paged-out pages."""

    #: Bytes it may occupy; None: a quarter of the VM's memory.
    limit: Size | None = None


def _long_enough(seconds: float) -> float:
    if seconds < PROTECTION_LEAST:
        raise ValueError(f"must be at least {PROTECTION_LEAST * 1000:g}ms: two scans of the guest must fit")
    return seconds


class FreezeConfig(Config):
    """When what a guest wrote becomes a layer, and how long a chain of layers may get."""

    #: Bytes written since a disk was frozen last that make it due; None: disks are frozen only when asked for.
    after: Size | None = None
    #: Seconds that must lie between.
    every: Seconds = 600.0
    #: Bytes that the files of a VM's disks may occupy; beyond that nothing is frozen by itself.
    disk_budget: Size = 4 * GiB
    #: Frozen files of a disk; beyond that they are merged. Each costs a look for every cluster a guest reads, a
    #: descriptor in QEMU and a slot in the ledger, which has 63 for all disks and for merged files in use.
    depth: Annotated[int, Field(strict=True, ge=1, le=16)] = 8

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.after is not None and self.after < FREEZE_AFTER_MIN:
            complain((("after",), f"at least {format_size(FREEZE_AFTER_MIN)}: each freeze makes a file and an index"))
        return self


def _without_line_ends(value: str) -> str:
    if set(value) & set("\0\r\n"):
        raise ValueError("must be one line")
    return value


def _argument(value: str) -> str:
    if "\0" in value:
        raise ValueError("must not contain a NUL")
    return value


class VmConfig(Config):
    """One VM."""

    name: Name
    machine: Text = "s390x"
    accelerator: Accelerator = Accelerator.TCG
    #: Bytes.
    memory: Size
    cpus: Count = 1
    #: An image's name, the path of a file that describes one, or the description itself.
    image: Annotated[str | ImageConfig, WrapValidator(_image_value)] = DEFAULT_IMAGE
    extra_disks: tuple[ExtraDisk, ...] = ()
    store: StoreConfig = StoreConfig()
    #: Bytes of a disk for the guest to swap to; None: no such disk.
    swap: Size | None = None
    freeze: FreezeConfig = FreezeConfig()
    #: Whether what the guest wrote to its root disk outlives the VM; the next one of that name boots from it.
    keep_disks: Flag = False
    #: Put behind the image's own on the guest kernel's command line.
    kernel_args: Annotated[str, AfterValidator(_without_line_ends)] = ""
    #: Put behind QEMU's own arguments; what would be unsafe is refused here.
    qemu_args: tuple[Annotated[str, AfterValidator(_argument)], ...] = ()
    #: Whether the host may run commands in the guest.
    allow_exec: Flag = False
    #: Seconds from the start of QEMU until the guest agent must be connected.
    boot_timeout: Seconds = 60.0
    #: Seconds a page may stay write-protected in an epoch. RAM is gone through in slices that fit.
    protection_limit: Annotated[Seconds, AfterValidator(_long_enough)] = 5.0

    @property
    def profile(self) -> MachineProfile:
        return PROFILES[self.machine]

    @property
    def store_limit(self) -> int:
        """Bytes the compressed store may occupy.

        A quarter by default: stable pages of a guest compress to a quarter of their size.
        """
        return self.memory // 4 if self.store.limit is None else self.store.limit

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        profile = PROFILES.get(self.machine)
        if profile is None:
            complain((("machine",), f"{self.machine!r} is not a machine profile; known: {', '.join(PROFILES)}"))
            return self
        wrong: list[tuple[Location, str]] = []
        if why := profile.check_memory(self.memory):
            wrong.append((("memory",), why))
        if self.store_limit > self.memory:
            wrong.append((("store", "limit"), f"is more than the VM's memory, {format_size(self.memory)}"))
        if self.cpus > profile.max_cpus:
            wrong.append((("cpus",), f"{self.cpus} is more than the {profile.max_cpus} of {profile.name}"))
        if self.swap is not None and (self.swap < SWAP_MIN or self.swap % PAGE_SIZE):
            wrong.append((("swap",), f"must be a multiple of {PAGE_SIZE} and at least {format_size(SWAP_MIN)}"))
        first: dict[Path, int] = {}
        for index, disk in enumerate(self.extra_disks):
            if first.setdefault(disk.path, index) != index:
                wrong.append((("extra_disks", index, "path"), f"{disk.path} is already disk {first[disk.path]}"))
        wrong += [(("qemu_args", index), why) for index, why in user_args.check(self.qemu_args)]
        complain(*wrong)
        return self

    def resolved(self, folder: Path) -> VmConfig:
        """The same with absolute paths, where relative ones mean ``folder``."""
        disks = tuple(disk.model_copy(update={"path": absolute(folder, disk.path)}) for disk in self.extra_disks)
        image = _image(self.image, folder) if isinstance(self.image, str) else self.image.resolved(folder)
        return self.model_copy(update={"extra_disks": disks, "image": image})


def image_path(image: str) -> Path | None:
    """The path of the file that describes ``image``, or None where ``image`` is a name (no '/', no .yaml)."""
    return Path(image) if "/" in image or image.endswith((".yaml", ".yml")) else None


def _image(image: str, folder: Path) -> str:
    path = image_path(image)
    return image if path is None else str(absolute(folder, path))


class _VmKey(Config):
    """A file with a ``vm:`` key; a scenario's steps are no concern of who only wants the VM."""

    vm: VmConfig
    steps: list[Any] = []


class _VmFile(RootModel[VmConfig]):
    @model_validator(mode="wrap")
    @classmethod
    def _either(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        return handler(_VmKey.model_validate(data).vm if isinstance(data, Mapping) and "vm" in data else data)


def load_vm(path: Path) -> VmConfig:
    """The VM a file describes, at its top level or below ``vm:``; its paths absolute.

    :raise ConfigError: naming the file, line and key.
    """
    return strict_yaml.load(path, _VmFile).root.resolved(path.parent)
