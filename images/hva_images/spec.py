"""Which image is meant: the default one, or one that a user describes in a file."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from hvaqemu.errors import ConfigError
from hvaqemu.image_config import DEFAULT_IMAGE as DEFAULT
from hvaqemu.image_config import ImageConfig as ImageSpec
from hvaqemu.image_config import load_image as load_image_spec
from hvaqemu.units import GiB

__all__ = ["DEFAULT", "DEFAULT_SIZE", "ImageSpec", "Wanted", "load_image_spec", "resolve"]

DEFAULT_SIZE = 1 * GiB


@dataclass(frozen=True)
class Wanted:
    """An image to build."""

    name: str
    #: On top of the default image's own.
    packages: tuple[str, ...] = ()
    #: Path in the guest -> file on the host.
    files: dict[str, Path] = field(default_factory=dict)
    #: Bytes; None: the default's, or more if what is added takes more.
    size: int | None = None


def resolve(reference: str | ImageSpec, base_dir: Path) -> Wanted:
    """The image that ``reference`` names: ``debian-s390x``, or the path of a file; relative paths mean ``base_dir``.

    :raise ConfigError: it names neither, or the file is wrong.
    """
    if reference == DEFAULT:
        return Wanted(DEFAULT)
    if isinstance(reference, str):
        path = base_dir / Path(reference).expanduser()
        if not path.exists() and "/" not in reference and not reference.endswith((".yaml", ".yml")):
            raise ConfigError(f"{reference}: no such image", f"write {DEFAULT}, or the path of an image file")
        spec = load_image_spec(path)
    else:
        spec = reference.resolved(base_dir)
    return Wanted(spec.name, spec.packages, dict(spec.files), spec.size)
