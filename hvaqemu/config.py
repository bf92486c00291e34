"""What a user writes about a VM and its image: frozen, strict, the same after a trip through JSON.

Relative paths mean the folder of the file they stand in; :func:`load_vm` makes them absolute.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    RootModel,
    StringConstraints,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from hvaqemu import strict_yaml
from hvaqemu.errors import ConfigError
from hvaqemu.qemu.profile import PROFILES, MachineProfile
from hvaqemu.units import MiB, parse_duration, parse_size

VM_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
#: Debian Policy 5.6.1.
_PACKAGE = re.compile(r"[a-z0-9][a-z0-9+.-]+")


class Config(BaseModel):
    """A value a user wrote."""

    model_config = ConfigDict(frozen=True, extra="forbid")


Location = tuple[str | int, ...]


def complain(*complaints: tuple[Location, str]) -> None:
    """Raise what is wrong with fields taken together, at the places below the model that asks; nothing: return."""
    if complaints:
        raise ValidationError.from_exception_data(
            "config",
            [
                InitErrorDetails(
                    type=PydanticCustomError("value_error", "{what}", {"what": what}), loc=where, input=None
                )
                for where, what in complaints
            ],
        )


def _size(value: object) -> object:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str | float | bool):
        return parse_size(value)  # type: ignore[arg-type]
    raise ValueError("write a size, for example 512M")


def _duration(value: object) -> object:
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    if isinstance(value, str | float | bool):
        return parse_duration(value)
    raise ValueError("write a duration, for example 30s")


def _vm_name(value: str) -> str:
    if VM_NAME.fullmatch(value) is None:
        raise ValueError("must be 1 to 63 letters, digits, '.', '_' or '-', and begin with a letter or digit")
    return value


def _package(value: str) -> str:
    if _PACKAGE.fullmatch(value) is None:
        raise ValueError(f"{value!r} is not the name of a Debian package")
    return value


def _a_path(value: str) -> str:
    if not value or "\0" in value:
        raise ValueError("must be a path")
    return value


def _guest_path(value: str) -> str:
    path = Path(value)
    if not path.is_absolute() or ".." in path.parts or "\0" in value or path == Path("/"):
        raise ValueError(f"{value!r} is not an absolute path of a file in the guest")
    return value


#: Bytes; written as a number or as text ("512M").
Size = Annotated[int, BeforeValidator(_size), Field(ge=0)]
#: Seconds; written as a number or as text ("200ms").
Seconds = Annotated[float, BeforeValidator(_duration), Field(gt=0, allow_inf_nan=False)]
Flag = Annotated[bool, Field(strict=True)]
Count = Annotated[int, Field(strict=True, ge=1)]
Name = Annotated[str, AfterValidator(_vm_name)]
Text = Annotated[str, StringConstraints(min_length=1)]
HostPath = Annotated[Path, BeforeValidator(lambda value: _a_path(value) if isinstance(value, str) else value)]


class Accelerator(StrEnum):
    """How QEMU runs the guest's processors."""

    TCG = "tcg"
    KVM = "kvm"


class ImageConfig(Config):
    """A guest image of the user's own: a base and what is added to it."""

    name: Name
    base: Text = "debian-s390x"
    packages: tuple[Annotated[str, AfterValidator(_package)], ...] = ()
    #: Absolute path in the guest -> file on this host.
    files: dict[Annotated[str, AfterValidator(_guest_path)], HostPath] = {}
    #: Bytes of the root disk; None: as large as the base asks for.
    size: Size | None = None

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.size is not None and (self.size % MiB or self.size == 0):
            complain((("size",), "must be a whole number of MiB"))
        return self

    def resolved(self, folder: Path) -> ImageConfig:
        """The same with absolute paths, where relative ones mean ``folder``."""
        files = {inside: _absolute(folder, outside) for inside, outside in self.files.items()}
        return self.model_copy(update={"files": files, "base": _image(self.base, folder)})


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


class VmConfig(Config):
    """One VM."""

    name: Name
    machine: Text = "s390x"
    accelerator: Accelerator = Accelerator.TCG
    #: Bytes.
    memory: Size
    cpus: Count = 1
    #: An image's name, the path of a file that describes one, or the description itself.
    image: Annotated[str | ImageConfig, WrapValidator(_image_value)] = "debian-s390x"
    extra_disks: tuple[ExtraDisk, ...] = ()
    #: Whether the host may run commands in the guest.
    allow_exec: Flag = False
    #: Seconds from the start of QEMU until the guest agent must be connected.
    boot_timeout: Seconds = 60.0

    @property
    def profile(self) -> MachineProfile:
        return PROFILES[self.machine]

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        profile = PROFILES.get(self.machine)
        if profile is None:
            complain((("machine",), f"{self.machine!r} is not a machine profile; known: {', '.join(PROFILES)}"))
            return self
        wrong: list[tuple[Location, str]] = []
        if why := profile.check_memory(self.memory):
            wrong.append((("memory",), why))
        if self.cpus > profile.max_cpus:
            wrong.append((("cpus",), f"{self.cpus} is more than the {profile.max_cpus} of {profile.name}"))
        first: dict[Path, int] = {}
        for index, disk in enumerate(self.extra_disks):
            if first.setdefault(disk.path, index) != index:
                wrong.append((("extra_disks", index, "path"), f"{disk.path} is already disk {first[disk.path]}"))
        complain(*wrong)
        return self

    def resolved(self, folder: Path) -> VmConfig:
        """The same with absolute paths, where relative ones mean ``folder``."""
        disks = tuple(disk.model_copy(update={"path": _absolute(folder, disk.path)}) for disk in self.extra_disks)
        image = _image(self.image, folder) if isinstance(self.image, str) else self.image.resolved(folder)
        return self.model_copy(update={"extra_disks": disks, "image": image})


def image_path(image: str) -> Path | None:
    """The path of the file that describes ``image``, or None where ``image`` is a name (no '/', no .yaml)."""
    return Path(image) if "/" in image or image.endswith((".yaml", ".yml")) else None


def _absolute(folder: Path, path: Path) -> Path:
    return folder.absolute() / path.expanduser()


def _image(image: str, folder: Path) -> str:
    path = image_path(image)
    return image if path is None else str(_absolute(folder, path))


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


def load_image(path: Path) -> ImageConfig:
    """The image a file describes; its paths absolute.

    :raise ConfigError: naming the file, line and key.
    """
    return strict_yaml.load(path, ImageConfig).resolved(path.parent)


def image_of(config: VmConfig) -> str | ImageConfig:
    """What a VM's ``image:`` means: a built-in image's name, or a description, read from its file where it is a path.

    :raise ConfigError: the file is wrong, or not there.
    """
    if isinstance(config.image, ImageConfig):
        return config.image
    path = image_path(config.image)
    if path is None:
        return config.image
    if path.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"{path}: an image is described by a .yaml file", "name one, or an image of `image list`")
    return load_image(path)
