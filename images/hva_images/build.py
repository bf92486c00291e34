"""From a specification to an image in the cache: resolve, download, unpack, finish, seal."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import stat
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from pathlib import Path

from hva_images import base, cache
from hva_images.agent import agent_sources, build_agent
from hva_images.cache import GuestImage
from hva_images.commands import run
from hva_images.debs import Deb, read_deb
from hva_images.filesystem import make_ext4, smallest_size
from hva_images.initramfs import build_initramfs
from hva_images.sources import Sources, load_sources
from hva_images.spec import DEFAULT_SIZE, ImageSpec, resolve
from hva_images.tree import Tree
from hvaqemu.errors import ConfigError, HostError
from hvaqemu.units import MiB, format_duration, format_size

#: The initramfs takes the first virtio disk on the bus as root.
KERNEL_ARGS = "rw"
ARCHITECTURE = "s390x"
#: Seconds for downloading and unpacking all packages.
_DOWNLOAD_DEADLINE = 1800.0
#: Bytes that the guest finds free in an image whose size nobody gave.
_ROOM = 256 * MiB

Progress = Callable[[str], None]


def ensure_image(reference: str | ImageSpec, *, base_dir: Path, progress: Progress) -> GuestImage:
    """The image that ``reference`` names, built if it is not in the cache; from the cache it comes at once.

    :param reference: ``debian-s390x``, the path of an image file (relative to ``base_dir``), or what one says.
    :param progress: is told one short line a step.
    :raise ConfigError: the reference, the file, a package or a file it names is wrong.
    :raise HostError: a tool, room on the disk, or apt's sources are missing, or a step failed. Nothing is left behind.
    :raise DeadlineExceeded: a step took far too long. Nothing is left behind.
    """
    spec = resolve(reference, base_dir)
    sources = load_sources()
    agent = agent_sources()
    directory = cache.place(spec.name, digest := _digest(spec, sources, agent))
    if (image := cache.load(directory)) is not None:
        return image
    try:
        with cache.exclusive(directory):
            if (image := cache.load(directory)) is not None:
                return image
            started = time.monotonic()
            progress(f"building image {spec.name}")
            with cache.staging(directory) as staging:
                _build(spec, sources, agent, digest, staging, progress)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise HostError(f"{directory.parent}: no space left on device", "an image takes about 2 GiB") from error
        raise HostError(f"{error.filename or directory}: {error.strerror}") from error
    except HostError as error:
        if "no space left on device" in error.message:
            raise HostError(f"{directory.parent}: no space left on device", "an image takes about 2 GiB") from error
        raise
    image = cache.load(directory)
    if image is None:
        raise HostError(f"{directory}: was built and is gone again")
    took = format_duration(time.monotonic() - started)
    progress(f"image {spec.name} is ready: {len(image.packages)} packages, {format_size(image.size_bytes)}, {took}")
    return image


def base_packages() -> list[str]:
    """What the default image asks apt for."""
    lines = (line.split("#")[0].strip() for line in base.data("packages.txt").decode().splitlines())
    return [line for line in lines if line]


def _digest(spec: ImageSpec, sources: Sources, agent: dict[str, bytes]) -> str:
    """SHA-256 of everything that decides what the image holds, but for the archive's state of the day."""
    own = hashlib.sha256()
    for path in sorted(_own_files(), key=str):
        own.update(path.name.encode() + b"\0" + path.read_bytes())
    inputs = {
        "builder": own.hexdigest(),
        "python": list(sys.version_info[:2]),
        "agent": {name: hashlib.sha256(content).hexdigest() for name, content in agent.items()},
        "sources": sources.text,
        "name": spec.name,
        "packages": list(spec.packages),
        "files": {guest: _file_digest(guest, host) for guest, host in spec.files.items()},
        "size": spec.size,
    }
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def _own_files() -> list[Path]:
    with resources.as_file(resources.files("hva_images")) as directory:
        return [path for path in directory.rglob("*") if path.is_file() and "__pycache__" not in path.parts]


def _file_digest(guest: str, host: Path) -> str:
    try:
        mode = host.stat().st_mode
        if not stat.S_ISREG(mode):
            raise ConfigError(f"{host}: is not a file, as {guest} in the image needs")
        with host.open("rb") as file:
            return f"{mode & 0o111:o} {hashlib.file_digest(file, 'sha256').hexdigest()}"
    except OSError as error:
        raise ConfigError(f"{host}: {error.strerror}, as {guest} in the image needs") from error


def _build(
    spec: ImageSpec, sources: Sources, agent: dict[str, bytes], digest: str, staging: Path, progress: Progress
) -> None:
    """Fill ``staging`` with the image."""
    work = staging / "work"
    work.mkdir()
    tree = Tree(work / "tree")
    debs = _unpack(tree, [*base_packages(), *spec.packages], sources, work, progress)
    epoch = max(member.mtime for deb in debs for member in deb.members)

    progress("setting up the system")
    base.finish(tree, spec.name, build_agent(agent, base.guest_python(tree)))
    for guest, host in spec.files.items():
        tree.install(guest, host, 0o755 if host.stat().st_mode & 0o100 else 0o644)
    tree.settle(epoch)

    size = spec.size or max(DEFAULT_SIZE, smallest_size(tree) + _ROOM)
    progress(f"making the file system ({format_size(size)})")
    make_ext4(tree, staging / cache.ROOT, size=size, label=spec.name, epoch=epoch)
    initramfs = build_initramfs(tree.root, base.kernel_release(tree), base.data("initramfs-init"))
    (staging / cache.INITRD).write_bytes(initramfs)
    shutil.copyfile(base.kernel_image(tree), staging / cache.KERNEL)
    outputs = (cache.KERNEL, cache.INITRD, cache.ROOT)
    for name in outputs:
        (staging / name).chmod(0o444)
    usr = [tree.root / path.lstrip("/") for path in tree.walk() if path.startswith("/usr/")]
    cache.write_manifest(
        staging,
        {
            "name": spec.name,
            "digest": digest,
            "kernel_args": KERNEL_ARGS,
            "size_bytes": size,
            "packages": {deb.info_name: deb.version for deb in debs},
            "sha256": {name: _sha256(staging / name) for name in outputs},
            "usr_bytes": sum(path.stat().st_size for path in usr if path.is_file() and not path.is_symlink()),
            "source_date_epoch": epoch,
            "sources": sources.text,
        },
    )
    shutil.rmtree(work)


def _unpack(tree: Tree, packages: list[str], sources: Sources, work: Path, progress: Progress) -> list[Deb]:
    """Download ``packages`` and what they depend on, unpack them all into ``tree``; nothing else is left in there."""
    listing = work / "debian.sources"
    listing.write_text(sources.text)
    # As the packages usr-is-merged and base-files want it, from the first file on.
    merge = 'mkdir -p "$1/usr/bin" "$1/usr/sbin" "$1/usr/lib" && ln -s usr/bin usr/sbin usr/lib "$1"'
    argv = ["mmdebstrap", "--mode=chrootless", "--variant=extract", f"--arch={ARCHITECTURE}", "--format=directory"]
    argv += [f"--setup-hook={merge}", "--skip=cleanup,chroot/mount,check/qemu", '--aptopt=Acquire::Retries "3"']
    argv += [f"--include={','.join(packages)}", sources.suite, str(tree.root), str(listing)]
    told: set[str] = set()

    def follow(line: str) -> None:
        for sign, text in (("apt-get update", "reading package lists"), ("downloading", "downloading packages"),
                           ("extracting", "unpacking packages")):  # fmt: skip
            if line.startswith("I: ") and sign in line and text not in told:
                told.add(text)
                progress(text)

    run(argv, what="fetching packages", deadline=_DOWNLOAD_DEADLINE, env={"TMPDIR": str(work)}, on_line=follow)
    archives = work / "debs"
    (tree.root / "var/cache/apt/archives").rename(archives)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        debs = list(pool.map(read_deb, sorted(archives.glob("*.deb"))))
    known = {f"/{link}" for link in ("bin", "sbin", "lib")}
    for deb in debs:
        tree.claim(deb.members)
        known.update(tree.real(member.path) for member in deb.members if not base.excluded(member.path))
    tree.sweep(known)
    return debs


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
