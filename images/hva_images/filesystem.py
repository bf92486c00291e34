"""Turns a tree into a raw ext4 image, without a mount or a privilege."""

from __future__ import annotations

import uuid
from pathlib import Path

from hva_images.commands import run
from hva_images.tree import Tree
from hvaqemu.errors import ConfigError, DeadlineExceeded, HostError
from hvaqemu.units import MiB, format_size

_NAMESPACE = uuid.UUID("8d6fb1b5-2c2c-4e4b-9f0f-5a0f6d4e2a11")
#: Chosen here, so that neither the host's mke2fs.conf nor a newer mke2fs makes what the guest's kernel can not mount.
_FEATURES = (
    "none,has_journal,ext_attr,resize_inode,dir_index,filetype,extent,64bit,flex_bg,sparse_super,large_file,"
    "huge_file,dir_nlink,extra_isize,metadata_csum"
)
_JOURNAL_MIB = 16
_DEADLINE = 600.0


def smallest_size(tree: Tree) -> int:
    """Bytes of the smallest image that holds ``tree`` and leaves a little room, in whole MiB."""
    needed = tree.bytes_needed() * 1.05 + (_JOURNAL_MIB + 24) * MiB
    return -(-int(needed) // MiB) * MiB


def make_ext4(tree: Tree, path: Path, *, size: int, label: str, epoch: int) -> None:
    """Write ``tree`` to a new file ``path`` of ``size`` bytes.

    :param epoch: the time of creation, seconds since 1970.
    :raise ConfigError: ``size`` is too small.
    :raise HostError: no room on the host's disk, or mke2fs failed.
    """
    if size < (smallest := smallest_size(tree)):
        files = format_size(tree.bytes_needed())
        raise ConfigError(
            f"size: {format_size(size)} is too small, the files alone take {files}",
            f"write at least {smallest // MiB}M",
        )
    identity = str(uuid.uuid5(_NAMESPACE, label))
    with path.open("xb") as file:
        file.truncate(size)
    inodes = max(65536, 2 * sum(1 for _ in tree.walk()))
    times = {"SOURCE_DATE_EPOCH": str(epoch), "E2FSPROGS_FAKE_TIME": str(epoch)}
    argv = ["mke2fs", "-q", "-F", "-t", "ext4", "-b", "4096", "-I", "256", "-N", str(inodes), "-m", "0"]
    argv += ["-O", _FEATURES, "-J", f"size={_JOURNAL_MIB}", "-L", label[:16], "-U", identity]
    argv += ["-E", f"hash_seed={identity},root_owner=0:0,lazy_itable_init=0,lazy_journal_init=0,nodiscard"]
    argv += ["-d", str(tree.root), str(path)]
    what = "making the file system"
    run(argv, what=what, deadline=_DEADLINE, env=times)
    if commands := _corrections(tree):
        run(["debugfs", "-w", "-f", "-", str(path)], what=what, deadline=_DEADLINE, env=times, stdin=commands)
    check_ext4(path)


def check_ext4(path: Path) -> None:
    """See that the file system in ``path`` is sound, without changing it.

    :raise HostError: it is not.
    """
    try:
        run(["e2fsck", "-f", "-n", str(path)], what="checking the file system", deadline=_DEADLINE)
    except DeadlineExceeded:
        raise
    except HostError as error:
        raise HostError(f"the file system that was made is not sound: {error.message}") from error


def _corrections(tree: Tree) -> bytes:
    """debugfs commands that give files to their owners."""
    lines: list[str] = []
    for path, wanted in tree.wrong_owners().items():
        quoted = '"' + path.replace('"', '""') + '"'
        lines += [f"sif {quoted} uid {wanted.uid}", f"sif {quoted} gid {wanted.gid}"]
    return "".join(f"{line}\n" for line in lines).encode()
