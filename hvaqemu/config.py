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
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)

from hvaqemu import strict_yaml
from hvaqemu.fields import Config, Count, Flag, HostPath, Location, Name, Seconds, Size, Text, absolute, complain
from hvaqemu.image_config import DEFAULT_IMAGE, ImageConfig
from hvaqemu.network_config import Network, UserNetwork
from hvaqemu.pages import PAGE_SIZE
from hvaqemu.qemu import user_args
from hvaqemu.qemu.profile import PROFILES, MachineProfile
from hvaqemu.reclaim_config import DEFAULTS_KEY, ReclaimConfig, ReclaimMode, over
from hvaqemu.units import GiB, MiB, format_size

FREEZE_AFTER_MIN = 16 * MiB
SWAP_MIN = 16 * MiB
#: Well within QEMU's own bounds, 1 MiB and 2 GiB (7.2, tcg/region.c).
TRANSLATION_MIN, TRANSLATION_MAX = 4 * MiB, GiB

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
    #: Whether pages may depend on it; None: if it is a file that the guest only reads.
    layer: Flag | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.layer and not self.read_only:
            complain((("layer",), "a disk that is written changes, and is no layer; set read_only: true"))
        if self.layer and self.direct:
            complain((("layer",), "a disk with direct I/O is no layer; set direct: false"))
        return self


class StoreConfig(Config):
    """The compressed store of the VM's paged-out pages."""

    #: Bytes it may occupy; None: a quarter of the VM's memory.
    limit: Size | None = None
    #: A folder on whose disk it is, in a file without a name that goes with the VM; None: it is in the host's memory.
    folder: HostPath | None = None


class BalloonConfig(Config):
    """What the guest's balloon does by itself; QMP can change its size in any case."""

    #: A guest that would otherwise kill a process takes memory back.
    deflate_on_oom: Flag = False
    #: The guest tells QEMU of free pages, and QEMU discards them. Then hvaqemu discards nothing of this VM, ever.
    free_page_reporting: Flag = False


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
    #: Seconds; a merge that moves nothing for so long is taken back.
    patience: Seconds = 60.0

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
    balloon: BalloonConfig = BalloonConfig()
    reclaim: ReclaimConfig = ReclaimConfig()
    #: Whether what the guest wrote to its root disk outlives the VM; the next one of that name boots from it.
    keep_disks: Flag = False
    #: Bytes of QEMU's memory for translated guest code; None: the machine profile's.
    translation_buffer: Size | None = None
    #: The one network device, if any; needs no privilege by default.
    network: Network = UserNetwork()
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
    def translation_mib(self) -> int:
        """MiB of the translation buffer."""
        given = self.translation_buffer
        return self.profile.translation_mib if given is None else given // MiB

    @property
    def store_limit(self) -> int:
        """Bytes the compressed store may occupy.

        A quarter by default: stable pages of a guest compress to a quarter of their size.
        """
        return self.memory // 4 if self.store.limit is None else self.store.limit

    @model_validator(mode="before")
    @classmethod
    def _over_the_fleets(cls, data: Any, info: ValidationInfo) -> Any:
        """With a fleet's ``defaults.reclaim`` below the VM's own."""
        if not isinstance(data, Mapping) or not info.context or DEFAULTS_KEY not in info.context:
            return data
        return {**data, "reclaim": over(info.context[DEFAULTS_KEY], data.get("reclaim", {}))}

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
        if self.balloon.free_page_reporting and self.reclaim.mode is not ReclaimMode.OFF:
            wrong.append((("balloon", "free_page_reporting"), "needs `reclaim: {mode: off}`: QEMU discards by itself"))
        if self.cpus > profile.max_cpus:
            wrong.append((("cpus",), f"{self.cpus} is more than the {profile.max_cpus} of {profile.name}"))
        if self.swap is not None and (self.swap < SWAP_MIN or self.swap % PAGE_SIZE):
            wrong.append((("swap",), f"must be a multiple of {PAGE_SIZE} and at least {format_size(SWAP_MIN)}"))
        if why := self._wrong_translation():
            wrong.append((("translation_buffer",), why))
        first: dict[Path, int] = {}
        for index, disk in enumerate(self.extra_disks):
            if first.setdefault(disk.path, index) != index:
                wrong.append((("extra_disks", index, "path"), f"{disk.path} is already disk {first[disk.path]}"))
        wrong += [(("qemu_args", index), why) for index, why in user_args.check(self.qemu_args)]
        complain(*wrong)
        return self

    def _wrong_translation(self) -> str:
        size = self.translation_buffer
        if size is None:
            return ""
        if self.accelerator is not Accelerator.TCG:
            return f"accelerator {self.accelerator} translates nothing; leave it out"
        if size % MiB or not TRANSLATION_MIN <= size <= TRANSLATION_MAX:
            return f"must be whole MiB, from {format_size(TRANSLATION_MIN)} to {format_size(TRANSLATION_MAX)}"
        return ""

    def resolved(self, folder: Path) -> VmConfig:
        """The same with absolute paths, where relative ones mean ``folder``."""
        disks = tuple(disk.model_copy(update={"path": absolute(folder, disk.path)}) for disk in self.extra_disks)
        image = _image(self.image, folder) if isinstance(self.image, str) else self.image.resolved(folder)
        store = self.store
        if store.folder is not None:
            store = store.model_copy(update={"folder": absolute(folder, store.folder)})
        return self.model_copy(update={"extra_disks": disks, "image": image, "store": store})


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
    def _either(cls, data: Any, handler: ModelWrapValidatorHandler[Self], info: ValidationInfo) -> Self:
        below = isinstance(data, Mapping) and "vm" in data
        return handler(_VmKey.model_validate(data, context=info.context).vm if below else data)


def load_vm(path: Path, defaults: Mapping[str, Any] | None = None) -> VmConfig:
    """The VM a file describes, at its top level or below ``vm:``; its paths absolute.

    :param defaults: keys of ``reclaim`` where the file does not have them.
    :raise ConfigError: naming the file, line and key.
    """
    context = None if defaults is None else {DEFAULTS_KEY: defaults}
    return strict_yaml.load(path, _VmFile, context).root.resolved(path.parent)
