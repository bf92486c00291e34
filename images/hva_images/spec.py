"""What a user asks for: the default image, or a file that adds packages and files to it."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator

from hvaqemu import strict_yaml
from hvaqemu.errors import ConfigError
from hvaqemu.units import GiB, MiB, TiB, parse_size

#: The image that all others are made from.
DEFAULT = "debian-s390x"
DEFAULT_SIZE = 1 * GiB

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,39}")
_PACKAGE = re.compile(r"[a-z0-9][a-z0-9+.-]+")
#: Where a file would be hidden by what is mounted there, or break the guest's way to start.
_NO_FILES = (
    "/dev",
    "/proc",
    "/sys",
    "/run",
    "/tmp",
    "/var/run",
    "/var/lock",
    "/usr/lib/hva",
    "/lib/hva",
    "/var/lib/dpkg",
)


def _size(value: object) -> int:
    size = parse_size(str(value))
    if not 64 * MiB <= size <= 4 * TiB:
        raise ValueError(f"{value!r} is not between 64M and 4T")
    return -(-size // MiB) * MiB


class ImageSpec(BaseModel):
    """An image to build."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    base: str = DEFAULT
    packages: tuple[str, ...] = ()
    #: Path in the guest -> file on the host.
    files: dict[str, Path] = Field(default_factory=dict)
    #: Bytes; none: the default's, or more if what is added takes more.
    size: Annotated[int, BeforeValidator(_size)] | None = None

    @field_validator("name")
    @classmethod
    def _name(cls, value: str) -> str:
        if not _NAME.fullmatch(value):
            raise ValueError("must be of a-z, 0-9, '.', '_' and '-', begin with a letter or digit, and have at most 40")
        return value

    @field_validator("base")
    @classmethod
    def _base(cls, value: str) -> str:
        if value != DEFAULT:
            raise ValueError(f"{value!r} is no image to build on; write {DEFAULT}")
        return value

    @field_validator("packages")
    @classmethod
    def _packages(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for package in value:
            if not _PACKAGE.fullmatch(package):
                raise ValueError(f"{package!r} is not the name of a Debian package")
        return tuple(sorted(set(value)))

    @field_validator("files", mode="before")
    @classmethod
    def _files(cls, value: Any) -> Any:
        for path in value if isinstance(value, dict) else ():
            if not path.startswith("/") or os.path.normpath(path) != path or path == "/" or not path.isprintable():
                raise ValueError(f"{path!r} must be the absolute path of a file in the guest, without '.' and '..'")
            if any(path == place or path.startswith(place + "/") for place in _NO_FILES):
                raise ValueError(f"{path!r} is in a place where the guest could not see it or not start with it")
        return value


def load_image_spec(path: Path) -> ImageSpec:
    """The image file at ``path``; the host's files it names are relative to its directory.

    :raise ConfigError: naming file, line and key.
    """
    spec = strict_yaml.load(path, ImageSpec)
    if spec.name == DEFAULT:
        raise ConfigError(f"{path}: key name: {DEFAULT} is the default image; choose another name")
    directory = path.absolute().parent
    files = {guest: directory / host for guest, host in spec.files.items()}
    return spec.model_copy(update={"files": files})


def resolve(reference: str | ImageSpec, base_dir: Path) -> ImageSpec:
    """The image that ``reference`` names: ``debian-s390x``, or the path of a file, relative to ``base_dir``.

    :raise ConfigError: it names neither, or the file is wrong.
    """
    if isinstance(reference, ImageSpec):
        return reference
    if reference == DEFAULT:
        return ImageSpec(name=DEFAULT)
    path = base_dir / Path(reference).expanduser()
    if not path.exists() and "/" not in reference and not reference.endswith((".yaml", ".yml")):
        raise ConfigError(f"{reference}: no such image", f"write {DEFAULT}, or the path of an image file")
    return load_image_spec(path)
