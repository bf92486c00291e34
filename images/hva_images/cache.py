"""Where built images are kept: one directory an image and digest, complete or not there at all."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hvaqemu.errors import HostError
from hvaqemu.paths import cache_dir

KERNEL, INITRD, ROOT, MANIFEST = "kernel", "initrd", "root.ext4", "manifest.json"


@dataclass(frozen=True)
class GuestImage:
    """A built image. ``root`` is a raw ext4 file that nobody may write (0444); VMs put an overlay on it."""

    name: str
    #: Of everything the image was made from; another digest is another image.
    digest: str
    #: Of everything but the guest agent.
    system: str
    kernel: Path
    initrd: Path
    root: Path
    #: For the kernel, without the project's own ``hva.`` switches.
    kernel_args: str
    #: Of ``root``.
    size_bytes: int
    #: Package -> version of all packages in the image.
    packages: Mapping[str, str]
    #: File name -> SHA-256 of kernel, initrd and root.
    sha256: Mapping[str, str]
    #: Bytes of regular files below /usr.
    usr_bytes: int

    @property
    def directory(self) -> Path:
        return self.root.parent


def images_dir() -> Path:
    """The directory of all images.

    :raise HostError: it can not be made.
    """
    path = cache_dir() / "images"
    try:
        path.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise HostError(f"{path}: {error.strerror}") from error
    return path


def place(name: str, digest: str) -> Path:
    """Where the image ``name`` with ``digest`` is or will be."""
    return images_dir() / f"{name}-{digest[:16]}"


def load(directory: Path) -> GuestImage | None:
    """The image in ``directory``; None where there is none that is whole."""
    try:
        manifest = json.loads((directory / MANIFEST).read_text())
        image = GuestImage(
            name=manifest["name"],
            digest=manifest["digest"],
            system=manifest["system"],
            kernel=directory / KERNEL,
            initrd=directory / INITRD,
            root=directory / ROOT,
            kernel_args=manifest["kernel_args"],
            size_bytes=manifest["size_bytes"],
            packages=manifest["packages"],
            sha256=manifest["sha256"],
            usr_bytes=manifest["usr_bytes"],
        )
        whole = image.root.stat().st_size == image.size_bytes and image.kernel.is_file() and image.initrd.is_file()
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return image if whole else None


def list_images() -> list[GuestImage]:
    """All built images, by name, the newest of a name first."""
    found = [(path.stat().st_mtime, image) for path in images_dir().iterdir() if (image := load(path)) is not None]
    return [image for _, image in sorted(found, key=lambda each: (each[1].name, -each[0]))]


@contextlib.contextmanager
def exclusive(directory: Path) -> Iterator[None]:
    """Hold the right to build ``directory``; waits for another build of it, which ends with its process."""
    path = _lock_of(directory)
    descriptor = _lock(path, fcntl.LOCK_EX)
    try:
        yield
    finally:
        # While it is held: who waits for it sees that the file is gone, and makes a new one.
        path.unlink(missing_ok=True)
        os.close(descriptor)


def sweep() -> None:
    """Remove what builds left that were killed."""
    for leftover in images_dir().glob(".*.building"):
        path = _lock_of(leftover.parent / leftover.name.removeprefix(".").removesuffix(".building"))
        try:
            descriptor = _lock(path, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            continue
        try:
            _remove(leftover)
        finally:
            path.unlink(missing_ok=True)
            os.close(descriptor)


def _lock_of(directory: Path) -> Path:
    return directory.parent / f".{directory.name}.lock"


def _lock(path: Path, how: int) -> int:
    """A descriptor that holds the lock file ``path``.

    :raise BlockingIOError: another process holds it, and ``how`` is not to wait.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, how)
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_ino == os.fstat(descriptor).st_ino:
                    return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


@contextlib.contextmanager
def staging(directory: Path) -> Iterator[Path]:
    """An empty directory beside ``directory`` that takes its place if the block ends well, and is gone if not.

    To be called with the right to build ``directory``: what an interrupted build left is removed first.
    """
    temporary = directory.parent / f".{directory.name}.building"
    _remove(temporary)
    temporary.mkdir(mode=0o700)
    try:
        yield temporary
        for path in temporary.iterdir():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        # What is there but not whole was damaged from outside.
        _remove(directory)
        temporary.rename(directory)
    finally:
        _remove(temporary)


def same_system(name: str, system: str) -> GuestImage | None:
    """An image that differs from what is wanted by its guest agent only."""
    return next((image for image in list_images() if (image.name, image.system) == (name, system)), None)


def write_manifest(directory: Path, facts: dict[str, Any]) -> None:
    """Write the file that makes ``directory`` an image; ``facts`` has the fields that :func:`load` reads."""
    (directory / MANIFEST).write_text(json.dumps(facts, indent=1, sort_keys=True) + "\n")


def _remove(path: Path) -> None:
    if not os.path.lexists(path):
        return
    # Packages bring directories that an ordinary user may not empty without this.
    for directory, subdirectories, _ in os.walk(path):
        for name in subdirectories:
            where = Path(directory, name)
            if not where.is_symlink():
                where.chmod(0o700)
    shutil.rmtree(path)
