"""The first boot of an image that is being built: the packages whose scripts matter are installed by dpkg itself.

The guest runs emulated, with the image as its disk and the packages on a second one. What it says on its console is
followed; whether it did its work is read from dpkg's database in the image afterwards.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

from hva_images.commands import run
from hva_images.debs import Deb
from hva_images.dpkg_database import ADMIN, installed
from hva_images.filesystem import check_ext4, make_ext4, read_file, smallest_size
from hva_images.tree import Tree
from hvaqemu.errors import HostError

_DEADLINE = 1800.0
_MEMORY = "1G"
_SETTING_UP = re.compile(r"Setting up ([a-z0-9][a-z0-9+.-]*)")
_DPKG_ERROR = re.compile(r"dpkg: error processing (?:package|archive) (\S+)")
_FINISHED = "hva-firstboot: finished"


def steps(debs: list[Deb]) -> list[list[Deb]]:
    """``debs`` in the order in which dpkg can unpack them: what a step pre-depends on is installed by those before."""
    by_name = {deb.name: deb for deb in debs}
    levels: dict[str, int] = {}

    def level(name: str, above: frozenset[str]) -> int:
        if name not in levels:
            needed = [each for each in by_name[name].relations("Pre-Depends") if each in by_name and each not in above]
            levels[name] = 1 + max((level(each, above | {name}) for each in needed), default=-1)
        return levels[name]

    ordered: dict[int, list[Deb]] = {}
    for name in sorted(by_name):
        ordered.setdefault(level(name, frozenset({name})), []).append(by_name[name])
    return [ordered[number] for number in sorted(ordered)]


def first_boot(
    image: Path, kernel: Path, initrd: Path, debs: list[Deb], work: Path, progress: Callable[[str], None]
) -> None:
    """Boot ``image`` and let it install ``debs``.

    :param work: an empty directory that may be filled.
    :raise HostError: a package could not be installed; the message names it and carries the line that says why.
    :raise DeadlineExceeded: the guest took far too long.
    """
    disk = _disk_of(debs, work)
    lines: list[str] = []

    def follow(line: str) -> None:
        lines.append(line)
        if match := _SETTING_UP.match(line):
            progress(f"configuring {match[1]}")

    progress(f"first boot, to configure {len(debs)} packages")
    run(
        _command(image, disk, kernel, initrd),
        what="first boot of the image",
        deadline=_DEADLINE,
        on_line=follow,
        console=True,
    )
    finished = any(line.startswith(_FINISHED) for line in lines)
    check_ext4(image)
    status = installed(read_file(image, f"{ADMIN}/status").decode(errors="replace"))
    missing = sorted(
        {name for name, done in status.items() if not done} | {deb.name for deb in debs if deb.name not in status}
    )
    if missing or not finished:
        raise HostError(_complaint(missing, lines))


def _disk_of(debs: list[Deb], work: Path) -> Path:
    tree = Tree(work / "packages")
    tree.root.mkdir()
    for number, step in enumerate(steps(debs)):
        directory = tree.root / f"{number:03}"
        directory.mkdir()
        for deb in step:
            shutil.copyfile(deb.path, directory / deb.path.name)
    disk = work / "packages.ext4"
    make_ext4(tree, disk, size=smallest_size(tree), label="hva-packages", epoch=0)
    return disk


def _command(image: Path, disk: Path, kernel: Path, initrd: Path) -> list[str]:
    # The first disk on the bus is the root. QEMU doubles no commas here: the paths are the builder's own.
    argv = ["qemu-system-s390x", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
    argv += ["-machine", "s390-ccw-virtio", "-accel", "tcg", "-m", _MEMORY, "-smp", "2"]
    argv += ["-kernel", str(kernel), "-initrd", str(initrd), "-append", "rw hva.firstboot panic=-1"]
    argv += ["-chardev", "stdio,id=console,signal=off", "-device", "sclpconsole,chardev=console"]
    for name, path, read_only in (("root", image, "off"), ("packages", disk, "on")):
        file = str(path).replace(",", ",,")
        argv += [
            "-blockdev",
            f"driver=raw,node-name={name},read-only={read_only},cache.no-flush=on,file.driver=file,file.filename={file}",
        ]
        argv += ["-device", f"virtio-blk-ccw,drive={name}"]
    argv += ["-object", "rng-random,id=rng,filename=/dev/urandom", "-device", "virtio-rng-ccw,rng=rng"]
    return argv


def _complaint(missing: list[str], lines: list[str]) -> str:
    """One line: which packages, and the last thing said before dpkg gave one up."""
    what = (
        f"packages that could not be configured in the image: {', '.join(missing)}"
        if missing
        else "the first boot failed"
    )
    reason = next((line for line in reversed(lines) if line.strip()), "it said nothing")
    for number, line in enumerate(lines):
        if _DPKG_ERROR.search(line):
            before = [each for each in lines[:number] if each.strip() and not _SETTING_UP.match(each)]
            after = lines[number + 1].strip() if number + 1 < len(lines) else ""
            reason = "; ".join(each for each in (*before[-1:], after) if each)
            break
    shown = "".join(letter if letter.isprintable() else "?" for letter in reason.strip())[:240]
    return f"{what} ({shown})"
