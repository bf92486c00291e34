"""Fetches packages and what they depend on, checked by apt, and unpacks them; none of their code is run."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from hva_images import base
from hva_images.commands import run
from hva_images.debs import Deb, read_deb
from hva_images.scripts import file_interests, why_scripts_matter
from hva_images.sources import Sources
from hva_images.tree import Tree
from hvaqemu.errors import ConfigError, HostError

ARCHITECTURE = "s390x"
#: Seconds for downloading and unpacking all packages.
_DEADLINE = 1800.0
#: What mmdebstrap says at the beginning of a step, and what the user is told.
_STEPS = {
    "I: running apt-get update": "reading package lists",
    "I: downloading packages": "downloading packages",
    "I: extracting archives": "unpacking packages",
}
_UNKNOWN = re.compile(r"E: (?:Unable to locate package (\S+)|Package '([^']+)' has no installation candidate)")
_UNMET = re.compile(r" (\S+ : (?:Depends|Pre-?Depends|Conflicts|Breaks): .*)")


@dataclass(frozen=True)
class Packages:
    """What is in an image."""

    #: Its files are in the tree, and nothing more needs to be done for it.
    unpacked: list[Deb]
    #: Must be installed by dpkg in the guest; nothing of it is in the tree.
    to_configure: list[Deb]

    @property
    def epoch(self) -> int:
        """The time of the newest file of all packages, seconds since 1970."""
        return max(member.mtime for deb in (*self.unpacked, *self.to_configure) for member in deb.members)


def unpack(
    tree: Tree, own: Sequence[str], asked: Sequence[str], sources: Sources, work: Path, progress: Callable[[str], None]
) -> Packages:
    """Fetch packages, and unpack into ``tree`` those whose scripts do not matter; nothing else is left in there.

    :param own: names the default image is made of.
    :param asked: names a user added.
    :param work: a directory for what is only needed while the image is built.
    :raise ConfigError: there is no such package.
    :raise HostError: they can not be fetched together.
    """
    _fetch(tree.root, [*own, *asked], sources, work, progress)
    archives = work / "debs"
    (tree.root / "var/cache/apt/archives").rename(archives)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        debs = list(pool.map(read_deb, sorted(archives.glob("*.deb"))))
    interests = [path for deb in debs for path in file_interests(deb)]
    found = Packages([], [])
    for deb in debs:
        matters = not base.configured(deb.name) and why_scripts_matter(deb, interests)
        (found.to_configure if matters else found.unpacked).append(deb)
    known = {f"/{link}" for link in ("bin", "sbin", "lib")}
    for deb in found.unpacked:
        tree.claim(deb.members)
        known.update(tree.real(member.path) for member in deb.members if not base.excluded(member.path))
    tree.sweep(known)
    return found


def _fetch(root: Path, names: list[str], sources: Sources, work: Path, progress: Callable[[str], None]) -> None:
    listing = work / "debian.sources"
    listing.write_text(sources.text)
    # As the packages usr-is-merged and base-files want it, from the first file on.
    merge = 'mkdir -p "$1/usr/bin" "$1/usr/sbin" "$1/usr/lib" && ln -s usr/bin usr/sbin usr/lib "$1"'
    # Nothing is mounted and nothing is run in the tree, so an ordinary user may do this.
    argv = ["mmdebstrap", "--mode=chrootless", "--variant=extract", f"--arch={ARCHITECTURE}", "--format=directory"]
    argv += [f"--setup-hook={merge}", "--skip=cleanup,chroot/mount,check/qemu", '--aptopt=Acquire::Retries "3"']
    argv += [f"--include={','.join(names)}", sources.suite, str(root), str(listing)]
    unknown: list[str] = []
    unmet: list[str] = []

    def follow(line: str) -> None:
        if match := _UNMET.fullmatch(line):
            unmet.append(match[1])
        if match := _UNKNOWN.search(line):
            unknown.append(match[1] or match[2])
        for beginning, text in _STEPS.items():
            if line.startswith(beginning):
                progress(text)

    try:
        run(argv, what="fetching packages", deadline=_DEADLINE, env={"TMPDIR": str(work)}, on_line=follow)
    except HostError as error:
        if unknown:
            raise ConfigError(
                f"Debian {sources.suite} has no package {', '.join(sorted(set(unknown)))} for {ARCHITECTURE}"
            ) from error
        if unmet:
            raise ConfigError(f"packages do not go together with the others of the image: {unmet[0]}") from error
        raise
