"""Turns a tree into a raw ext4 image, without a mount or a privilege."""

from __future__ import annotations

import stat
import uuid
from collections.abc import Iterator
from pathlib import Path

from hva_images.commands import run
from hva_images.tree import Attributes, Tree
from hvaqemu.errors import DeadlineExceeded, HostError
from hvaqemu.units import MiB

_NAMESPACE = uuid.UUID("8d6fb1b5-2c2c-4e4b-9f0f-5a0f6d4e2a11")
#: Chosen here, so that neither the host's mke2fs.conf nor a newer mke2fs makes what the guest's kernel can not mount.
_FEATURES = (
    "none,has_journal,ext_attr,resize_inode,dir_index,filetype,extent,64bit,flex_bg,sparse_super,large_file,"
    "huge_file,dir_nlink,extra_isize,metadata_csum"
)
_JOURNAL_MIB = 16
_DEADLINE = 600.0


def smallest_size(tree: Tree, more: int = 0) -> int:
    """Bytes of the smallest image that holds ``tree`` and ``more`` bytes, and leaves a little room, in whole MiB."""
    needed = (tree.bytes_needed() + more) * 1.05 + (_JOURNAL_MIB + 24) * MiB
    return -(-int(needed) // MiB) * MiB


def make_ext4(tree: Tree, path: Path, *, size: int, label: str, epoch: int) -> None:
    """Write ``tree`` to a new file ``path`` of ``size`` bytes, at least :func:`smallest_size`.

    The same tree gives the same bytes, whoever owns it and wherever it is: files are made one by one in the order of
    their paths, which the order in a directory of the host does not change.

    :param epoch: the time of creation, seconds since 1970; no file is younger.
    :raise HostError: no room on the host's disk, or e2fsprogs failed.
    """
    identity = str(uuid.uuid5(_NAMESPACE, label))
    with path.open("xb") as file:
        file.truncate(size)
    inodes = max(65536, 2 * sum(1 for _ in tree.walk()))
    argv = ["mke2fs", "-q", "-F", "-t", "ext4", "-b", "4096", "-I", "256", "-N", str(inodes), "-m", "0"]
    argv += ["-O", _FEATURES, "-J", f"size={_JOURNAL_MIB}", "-L", label[:16], "-U", identity]
    argv += ["-E", f"hash_seed={identity},root_owner=0:0,lazy_itable_init=0,lazy_journal_init=0,nodiscard", str(path)]
    what = "making the file system"
    run(argv, what=what, deadline=_DEADLINE, env=_times(epoch))
    _debugfs(path, "".join(f"{line}\n" for line in _recipe(tree, epoch)).encode(), what, epoch)
    check_ext4(path)


def _recipe(tree: Tree, epoch: int) -> Iterator[str]:
    """debugfs commands that make all that is in ``tree``."""
    first_of: dict[int, str] = {}
    names: dict[int, int] = {}
    for path in tree.walk():
        host = tree.root / path.lstrip("/")
        status = host.lstat()
        where = _quoted(path)
        names[status.st_ino] = names.get(status.st_ino, 0) + 1
        if stat.S_ISLNK(status.st_mode):
            yield f"symlink {where} {_quoted(str(host.readlink()))}"
        elif stat.S_ISDIR(status.st_mode):
            yield f"mkdir {where}"
        elif not stat.S_ISREG(status.st_mode):
            raise HostError(f"{path}: is neither file, directory nor link, and so can not be in an image")
        elif (first := first_of.setdefault(status.st_ino, path)) != path:
            yield f"ln {_quoted(first)} {where}"
            yield f"sif {where} links_count {names[status.st_ino]}"
            continue
        else:
            yield f"write {_quoted(str(host))} {where}"
        wanted = tree.attributes.get(path, Attributes(stat.S_IMODE(status.st_mode)))
        yield f"sif {where} mode 0{stat.S_IFMT(status.st_mode) | wanted.mode:o}"
        yield f"sif {where} uid {wanted.uid}"
        yield f"sif {where} gid {wanted.gid}"
        yield f"sif {where} mtime @{min(int(status.st_mtime), epoch)}"
        for field in ("atime", "ctime", "crtime"):
            yield f"sif {where} {field} @{epoch}"


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


def read_file(image: Path, path: str) -> bytes:
    """The content of file ``path`` in the file system ``image``; empty where there is none."""
    return run(["debugfs", "-R", f"cat {_quoted(path)}", str(image)], what=f"reading {path}", deadline=_DEADLINE)


def replace_file(image: Path, path: str, content: Path, epoch: int) -> None:
    """Put the host's file ``content`` in place of file ``path`` (root's, 0644) in the file system ``image``.

    :raise HostError: no room, or debugfs failed.
    """
    where = _quoted(path)
    commands = [f"rm {where}", f"write {_quoted(str(content))} {where}", f"sif {where} mode 0100644"]
    commands += [f"sif {where} {field} 0" for field in ("uid", "gid")]
    commands += [f"sif {where} {field} @{epoch}" for field in ("atime", "ctime", "mtime", "crtime")]
    _debugfs(image, "".join(f"{command}\n" for command in commands).encode(), f"replacing {path}", epoch)
    check_ext4(image)
    if read_file(image, path) != content.read_bytes():
        raise HostError(f"replacing {path}: debugfs did not write it", "is there room in the image?")


def _debugfs(image: Path, commands: bytes, what: str, epoch: int) -> None:
    """Run ``commands``; debugfs ends with success whatever happens, but says what went wrong."""
    said: list[str] = []
    argv = ["debugfs", "-w", "-f", "-", str(image)]
    run(argv, what=what, deadline=_DEADLINE, env=_times(epoch), stdin=commands, on_line=said.append)
    wrong = [line for line in said if line.strip() and not line.startswith("debugfs 1.")]
    if wrong:
        raise HostError(f"{what}: debugfs: {wrong[0][:200]}")


def _times(epoch: int) -> dict[str, str]:
    """What makes e2fsprogs believe that it is ``epoch`` (seconds since 1970); old versions know only the second."""
    return {"SOURCE_DATE_EPOCH": str(epoch), "E2FSPROGS_FAKE_TIME": str(max(epoch, 1))}


def _quoted(path: str) -> str:
    return '"' + path.replace('"', '""') + '"'
