"""From a VM's config to the files it is started with: image, layer index, disks."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from io import FileIO
from pathlib import Path

from hva_host.agent.chain import Chain, first_file
from hva_host.agent.layer_watch import holds_still, refuse_writers
from hva_host.agent.records import KeptDisk
from hva_host.memory.index import StaleIndexError, build_index, fingerprint_file
from hva_host.memory.layers import open_layer
from hva_host.memory.store_file import make_store_file
from hva_images import GuestImage, ensure_image, list_images
from hvaqemu.config import VmConfig
from hvaqemu.errors import ConfigError, HostError, RefusedError
from hvaqemu.paths import cache_dir
from hvaqemu.qemu.command import ROOT_NODE, SWAP_NODE, LaunchFiles, RawDisk
from hvaqemu.qemu.disk import check_extra_disks, create_empty, create_overlay
from hvaqemu.qemu.launch import CONSOLE_LOG
from hvaqemu.units import format_size

Progress = Callable[[str], None]

_TELL_SECONDS = 2.0


def image_of(config: VmConfig, progress: Progress) -> GuestImage:
    """The image a VM starts from, built if need be. Blocks, for a minute if it must be built.

    :raise HvaError: what is wrong with it.
    """
    return ensure_image(config.image, base_dir=Path.cwd(), progress=progress)


def image_of_kept(name: str, image: GuestImage, kept: KeptDisk) -> GuestImage:
    """The image that a kept disk lies on: its file, its kernel. Blocks, for seconds if the file is another one now.

    :param image: the one its VM would start from without.
    :raise ConfigError: it is gone, or does not hold what it held.
    """
    base = kept.chain.base
    found = next((each for each in (image, *list_images()) if each.root == base), None)
    hint = f"'hvaqemu down {name} --delete-disks' gives the disk up"
    if found is None or not found.root.exists():
        raise ConfigError(f"VM {name}: its disk was kept, and the image below it, {base}, is gone", hint)
    if not holds_still(found.root, kept.base):
        raise ConfigError(f"VM {name}: its disk was kept, and the image below it, {base}, has changed", hint)
    return found


def new_chains(config: VmConfig, image: GuestImage, disks: Path) -> tuple[Chain, ...]:
    """The VM's own disks, with nothing written to them; nothing is made here.

    :param disks: their directory.
    """
    root = Chain(disk=ROOT_NODE, base=image.root, files=(first_file(disks, ROOT_NODE),), size=image.size_bytes)
    if config.swap is None:
        return (root,)
    swap = Chain(disk=SWAP_NODE, base=None, files=(first_file(disks, SWAP_NODE),), size=config.swap)
    return root, swap


def make_disks(chains: Sequence[Chain]) -> None:
    """Make the files of new disks. Blocks for some 20 ms each.

    :raise HvaError: as :func:`hvaqemu.qemu.disk.create_overlay`.
    """
    for chain in chains:
        if chain.base is None:
            create_empty(chain.active, chain.size)
        else:
            create_overlay(chain.base, chain.active)


def launch_files(config: VmConfig, image: GuestImage, *, runtime: Path, chains: Sequence[Chain]) -> LaunchFiles:
    """What QEMU is started with; nothing is made here.

    :param runtime: the VM's runtime directory.
    :param chains: the VM's own disks.
    :raise ConfigError: an extra disk can not be used.
    """
    root = next(chain for chain in chains if chain.disk == ROOT_NODE)
    swap = next((chain.files for chain in chains if chain.disk == SWAP_NODE), ())
    return LaunchFiles(
        kernel=image.kernel,
        initrd=image.initrd,
        kernel_args=image.kernel_args,
        golden=image.root if root.base is None else root.base,
        overlay=root.active,
        frozen=root.frozen,
        swap=swap,
        console_log=runtime / CONSOLE_LOG,
        extra_disks=check_extra_disks(config.extra_disks),
    )


def store_file(config: VmConfig) -> FileIO | None:
    """The file for the compressed store, whose last descriptor is to be QEMU's; None where it is in memory.

    :raise HostError: it can not be where the config says.
    """
    if config.store.folder is None:
        return None
    try:
        return FileIO(make_store_file(config.store.folder, config.store_limit), "r+")
    except HostError as error:
        raise HostError(f"VM {config.name}: {error.message}", error.hint) from error


async def layers_of(image: GuestImage, disks: Sequence[RawDisk], progress: Progress) -> tuple[tuple[Path, Path], ...]:
    """What pages of a VM may depend on from its start: the file of its image and those of its extra disks that do not
    change, each with its index, which is built if there is none yet.

    :raise RefusedError: somebody has one open for writing.
    :raise HostError: one can not be read, or there is no room.
    """
    layers = [(image.root, await asyncio.to_thread(_ensure_index, image.root, progress))]
    for disk in disks:
        if disk.layer:
            try:
                index = await asyncio.to_thread(_ensure_index, disk.path, progress)
            except RefusedError as error:
                raise RefusedError(error.message, "end that first, or set layer: false in extra_disks") from error
            # The very file may be there already, by this or by another name.
            layers += [] if index in {known for _, known in layers} else [(disk.path, index)]
    return tuple(layers)


def _ensure_index(image: Path, progress: Progress) -> Path:
    refuse_writers(image)
    folder = cache_dir() / "index"
    try:
        status = image.stat()
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise HostError(f"{error.filename}: {error.strerror}") from error
    path = folder / ("-".join(f"{number:x}" for number in fingerprint_file(status)) + ".idx")
    try:
        open_layer(image, path).close()
    except StaleIndexError:
        progress(f"indexing {image.name}")
        build_index(image, path, _told(image, progress))
    return path


def _told(image: Path, progress: Progress) -> Callable[[int, int], None]:
    """Tells now and then how far an index has come."""
    told = time.monotonic()

    def tell(done: int, size: int) -> None:
        nonlocal told
        if time.monotonic() - told >= _TELL_SECONDS:
            told = time.monotonic()
            progress(f"indexing {image.name}: {format_size(done)} of {format_size(size)}")

    return tell
