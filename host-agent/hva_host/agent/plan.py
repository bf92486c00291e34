"""From a VM's config to the files it is started with: image, layer index, disks."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

from hva_host.agent.layer_watch import refuse_writers
from hva_host.memory.index import StaleIndexError, build_index, fingerprint_file
from hva_host.memory.layers import open_layer
from hva_images import GuestImage, ensure_image
from hvaqemu.config import VmConfig
from hvaqemu.errors import HostError
from hvaqemu.paths import cache_dir
from hvaqemu.qemu.command import LaunchFiles
from hvaqemu.qemu.disk import check_extra_disks
from hvaqemu.qemu.launch import CONSOLE_LOG

ROOT_OVERLAY = "root.qcow2"

Progress = Callable[[str], None]


def image_of(config: VmConfig, progress: Progress) -> GuestImage:
    """The image a VM starts from, built if need be. Blocks, for a minute if it must be built.

    :raise HvaError: what is wrong with it.
    """
    return ensure_image(config.image, base_dir=Path.cwd(), progress=progress)


def launch_files(config: VmConfig, image: GuestImage, *, runtime: Path, disks: Path) -> LaunchFiles:
    """What QEMU is started with; nothing is made here.

    :param runtime: the VM's runtime directory.
    :param disks: the directory of the VM's own disks.
    :raise ConfigError: an extra disk can not be used.
    """
    return LaunchFiles(
        kernel=image.kernel,
        initrd=image.initrd,
        kernel_args=image.kernel_args,
        golden=image.root,
        overlay=disks / ROOT_OVERLAY,
        console_log=runtime / CONSOLE_LOG,
        extra_disks=check_extra_disks(config.extra_disks),
    )


async def ensure_index(image: Path, progress: Progress) -> Path:
    """The layer index of an image, built if there is none yet.

    :raise RefusedError: somebody has the image open for writing.
    :raise HostError: the image can not be read, or there is no room.
    """
    return await asyncio.to_thread(_ensure_index, image, progress)


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
        build_index(image, path)
    return path
