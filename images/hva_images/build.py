"""From a specification to an image in the cache: resolve, look, build, seal."""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
import stat
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from hva_images import base, cache
from hva_images.agent import agent_sources, build_agent
from hva_images.cache import GuestImage
from hva_images.commands import run
from hva_images.dpkg_database import write_database
from hva_images.filesystem import make_ext4, replace_file, smallest_size
from hva_images.firstboot import first_boot
from hva_images.initramfs import build_initramfs
from hva_images.packages import Packages, unpack
from hva_images.sources import Sources, load_sources
from hva_images.spec import DEFAULT_SIZE, ImageSpec, Wanted, resolve
from hva_images.tree import Tree
from hvaqemu.errors import ConfigError, HostError
from hvaqemu.units import MiB, format_duration, format_size

#: The initramfs takes the first virtio disk on the bus as root.
KERNEL_ARGS = "rw"
#: Bytes that the guest finds free in an image whose size nobody gave.
_ROOM = 256 * MiB
_OUTPUTS = (cache.KERNEL, cache.INITRD, cache.ROOT)

Progress = Callable[[str], None]


@dataclass(frozen=True)
class _Job:
    """One image to build, and the digests of what it is made from."""

    wanted: Wanted
    sources: Sources
    agent: dict[str, bytes]
    system: str
    digest: str


def ensure_image(reference: str | ImageSpec, *, base_dir: Path, progress: Progress) -> GuestImage:
    """The image that ``reference`` names, built if it is not in the cache; from the cache it comes at once.

    :param reference: ``debian-s390x``, the path of an image file (relative to ``base_dir``), or what one says.
    :param progress: is told one short line a step.
    :raise ConfigError: the reference, the file, a package or a file it names is wrong.
    :raise HostError: a tool, room on the disk, or apt's sources are missing, or a step failed. Nothing is left behind.
    :raise DeadlineExceeded: a step took far too long. Nothing is left behind.
    """
    job = _job(resolve(reference, base_dir))
    directory = cache.place(job.wanted.name, job.digest)
    if (image := cache.load(directory)) is not None:
        return image
    started = time.monotonic()
    try:
        cache.sweep()
        with cache.exclusive(directory):
            if (image := cache.load(directory)) is not None:
                return image
            progress(f"building image {job.wanted.name}")
            with cache.staging(directory) as staging:
                if (relative := cache.same_system(job.wanted.name, job.system)) is not None:
                    _renew_agent(job, relative, staging, progress)
                else:
                    _build(job, staging, progress)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _no_room(directory) from error
        raise HostError(f"{error.filename or directory}: {error.strerror}") from error
    except HostError as error:
        if "no space left on device" in error.message.lower():
            raise _no_room(directory) from error
        raise
    image = cache.load(directory)
    if image is None:
        raise HostError(f"{directory}: was built and is gone again")
    took = format_duration(time.monotonic() - started)
    progress(f"image {image.name} is ready: {len(image.packages)} packages, {format_size(image.size_bytes)}, {took}")
    return image


def base_packages() -> list[str]:
    """What the default image asks apt for."""
    lines = (line.split("#")[0].strip() for line in base.data("packages.txt").decode().splitlines())
    return [line for line in lines if line]


def _no_room(directory: Path) -> HostError:
    return HostError(f"{directory.parent}: no space left on device", "building an image takes about 2 GiB")


def _job(wanted: Wanted) -> _Job:
    """Digest everything that decides what the image holds, but for the state of the package archive."""
    sources = load_sources()
    agent = agent_sources()
    own = hashlib.sha256()
    with resources.as_file(resources.files("hva_images")) as directory:
        files = [path for path in directory.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
        for path in sorted(files):
            own.update(path.name.encode() + b"\0" + path.read_bytes())
    inputs: dict[str, object] = {
        "builder": own.hexdigest(),
        "python": list(sys.version_info[:2]),
        "sources": sources.text,
        "name": wanted.name,
        "packages": list(wanted.packages),
        "files": {guest: _file_digest(guest, host) for guest, host in wanted.files.items()},
        "size": wanted.size,
    }
    system = _digest(inputs)
    agents = {name: hashlib.sha256(content).hexdigest() for name, content in agent.items()}
    return _Job(wanted, sources, agent, system, _digest({"system": system, "agent": agents}))


def _digest(inputs: dict[str, object]) -> str:
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def _file_digest(guest: str, host: Path) -> str:
    try:
        mode = host.stat().st_mode
        if not stat.S_ISREG(mode):
            raise ConfigError(f"{host}: is not a file, as {guest} in the image needs")
        return f"{mode & 0o111:o} {_sha256(host)}"
    except OSError as error:
        raise ConfigError(f"{host}: {error.strerror}, as {guest} in the image needs") from error


def _build(job: _Job, staging: Path, progress: Progress) -> None:
    """Fill ``staging`` with the image."""
    wanted = job.wanted
    work = staging / "work"
    work.mkdir()
    tree = Tree(work / "tree")
    packages = unpack(tree, base_packages(), wanted.packages, job.sources, work, progress)
    progress("setting up the system")
    python = base.guest_python(tree)
    base.finish(tree, wanted.name, build_agent(job.agent, python))
    write_database(tree, packages.unpacked)
    for guest, host in wanted.files.items():
        tree.install(guest, host, 0o755 if host.stat().st_mode & 0o100 else 0o644)

    root, kernel, initrd = (staging / name for name in (cache.ROOT, cache.KERNEL, cache.INITRD))
    shutil.copyfile(base.kernel_image(tree), kernel)
    initrd.write_bytes(build_initramfs(tree.root, base.kernel_release(tree), base.data("initramfs-init")))
    size = _size(tree, packages, wanted)
    progress(f"making the file system ({format_size(size)})")
    make_ext4(tree, root, size=size, label=wanted.name, epoch=packages.epoch)
    if packages.to_configure:
        first_boot(root, kernel, initrd, packages.to_configure, work, progress)
    versions = {deb.info_name: deb.version for deb in (*packages.unpacked, *packages.to_configure)}
    usr = [tree.root / path.lstrip("/") for path in tree.walk() if path.startswith("/usr/")]
    usr_bytes = sum(path.stat().st_size for path in usr if path.is_file() and not path.is_symlink())
    usr_bytes += sum(
        member.size for deb in packages.to_configure for member in deb.members if member.path[1:4] == "usr"
    )
    facts = {"packages": versions, "usr_bytes": usr_bytes, "source_date_epoch": packages.epoch, "python": python}
    shutil.rmtree(work)
    _seal(job, staging, facts)


def _size(tree: Tree, packages: Packages, wanted: Wanted) -> int:
    """Bytes of the root disk.

    :raise ConfigError: the size asked for is too small.
    """
    to_come = sum(deb.installed_bytes for deb in packages.to_configure)
    smallest = smallest_size(tree, to_come)
    if wanted.size is None:
        return max(DEFAULT_SIZE, smallest + _ROOM)
    if wanted.size < smallest:
        files = format_size(tree.bytes_needed() + to_come)
        raise ConfigError(
            f"image {wanted.name}: size: {format_size(wanted.size)} is too small, the files alone take {files}",
            f"write at least {smallest // MiB}M",
        )
    return wanted.size


def _renew_agent(job: _Job, relative: GuestImage, staging: Path, progress: Progress) -> None:
    """Fill ``staging`` with a copy of ``relative`` that has this guest agent."""
    progress("taking a built image, with the guest agent of today")
    for source, name in ((relative.kernel, cache.KERNEL), (relative.initrd, cache.INITRD), (relative.root, cache.ROOT)):
        copy = ["cp", "--reflink=auto", "--sparse=always", "--", str(source), str(staging / name)]
        run(copy, what="copying the image", deadline=600)
    root = staging / cache.ROOT
    root.chmod(0o600)
    manifest = json.loads((relative.directory / cache.MANIFEST).read_text())
    facts = {key: manifest[key] for key in ("packages", "usr_bytes", "source_date_epoch", "python")}
    major, minor = facts["python"]
    archive = staging / "agent.pyz"
    archive.write_bytes(build_agent(job.agent, (major, minor)))
    replace_file(root, base.AGENT, archive, facts["source_date_epoch"])
    archive.unlink()
    _seal(job, staging, facts)


def _seal(job: _Job, staging: Path, facts: dict[str, object]) -> None:
    """Make the outputs in ``staging`` read-only and write down what they are."""
    for name in _OUTPUTS:
        (staging / name).chmod(0o444)
    outputs = {
        "name": job.wanted.name,
        "digest": job.digest,
        "system": job.system,
        "kernel_args": KERNEL_ARGS,
        "size_bytes": (staging / cache.ROOT).stat().st_size,
        "sha256": {name: _sha256(staging / name) for name in _OUTPUTS},
        "sources": job.sources.text,
    }
    cache.write_manifest(staging, facts | outputs)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
