"""What a user writes about a guest image of their own: a base and what is added to it."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import Annotated

from pydantic import AfterValidator

from hvaqemu import strict_yaml
from hvaqemu.fields import Config, HostPath, Size, absolute
from hvaqemu.units import MiB, TiB

#: The image all others are made from.
DEFAULT_IMAGE = "debian-s390x"
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,39}")
#: Debian Policy 5.6.1.
_PACKAGE = re.compile(r"[a-z0-9][a-z0-9+.-]+")
#: Where a file would be hidden by what is mounted there, or break the guest's way to start.
_NO_FILES = tuple(
    PurePosixPath(path)
    for path in (
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
)


def _name(value: str) -> str:
    if _NAME.fullmatch(value) is None:
        raise ValueError("must be of a-z, 0-9, '.', '_' and '-', begin with a letter or digit, and have at most 40")
    if value == DEFAULT_IMAGE:
        raise ValueError(f"{DEFAULT_IMAGE} is the default image; choose another name")
    return value


def _base(value: str) -> str:
    if value != DEFAULT_IMAGE:
        raise ValueError(f"{value!r} is no image to build on; write {DEFAULT_IMAGE}")
    return value


def _package(value: str) -> str:
    if _PACKAGE.fullmatch(value) is None:
        raise ValueError(f"{value!r} is not the name of a Debian package")
    return value


def _guest_path(value: str) -> str:
    path = PurePosixPath(value)
    plain = str(path) == value and ".." not in path.parts and value.isprintable()
    if not path.is_absolute() or not plain or value == "/" or value.startswith("//"):
        raise ValueError(f"{value!r} must be the absolute path of a file in the guest, without '.' and '..'")
    if any(path == place or place in path.parents for place in _NO_FILES):
        raise ValueError(f"{value!r} is in a place where the guest could not see it or not start with it")
    return value


def _disk_size(value: int) -> int:
    if not 64 * MiB <= value <= 4 * TiB:
        raise ValueError("must be between 64M and 4T")
    return -(-value // MiB) * MiB


class ImageConfig(Config):
    """An image to build."""

    name: Annotated[str, AfterValidator(_name)]
    base: Annotated[str, AfterValidator(_base)] = DEFAULT_IMAGE
    #: Sorted, each once.
    packages: Annotated[
        tuple[Annotated[str, AfterValidator(_package)], ...], AfterValidator(lambda value: tuple(sorted(set(value))))
    ] = ()
    #: Absolute path in the guest -> file on this host.
    files: dict[Annotated[str, AfterValidator(_guest_path)], HostPath] = {}
    #: Bytes of the root disk, rounded up to MiB; None: as large as what is in it asks for.
    size: Annotated[Size, AfterValidator(_disk_size)] | None = None

    def resolved(self, folder: Path) -> ImageConfig:
        """The same with absolute paths, where relative ones mean ``folder``."""
        return self.model_copy(update={"files": {guest: absolute(folder, host) for guest, host in self.files.items()}})


def load_image(path: Path) -> ImageConfig:
    """The image a file describes; its paths absolute.

    :raise ConfigError: naming the file, line and key.
    """
    return strict_yaml.load(path, ImageConfig).resolved(path.parent)
