"""``hvaqemu image``: guest images."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hva_host.cli.arguments import Subparsers, add_command, add_json

if TYPE_CHECKING:
    from hva_images import GuestImage

_DEFAULT = "debian-s390x"
_DESCRIPTION = "Build guest images and list those that are built. VMs build what they need by themselves."
_BUILD = """\
Build a guest image: Debian's kernel, a small initramfs, and a root disk of Debian packages with the
guest agent in it. It is kept in the cache; what is there already comes at once. Needs no root and runs
no code of the guest's architecture.

NAME is debian-s390x, or a file that adds to it:
  name: mine
  base: debian-s390x
  packages: [fio, stress-ng]
  files: {/opt/job.sh: ./job.sh}
  size: 2G
"""
_LIST = "List the images in the cache."


def add_parser(subparsers: Subparsers) -> None:
    examples = "hvaqemu image build\nhvaqemu image build mine.yaml\nhvaqemu image list"
    parser = add_command(subparsers, "image", "build and list guest images", _DESCRIPTION, examples)
    actions = parser.add_subparsers(title="commands", metavar="COMMAND", dest="action", required=True)
    build = add_command(
        actions, "build", "build an image", _BUILD, "hvaqemu image build\nhvaqemu image build mine.yaml"
    )
    build.add_argument(
        "image", metavar="NAME", nargs="?", default=_DEFAULT, help=f"an image's name or file (default: {_DEFAULT})"
    )
    add_json(build)
    listing = add_command(actions, "list", "list the built images", _LIST, "hvaqemu image list --json")
    add_json(listing)


def run(options: argparse.Namespace) -> int:
    return _build(options) if options.action == "build" else _list(options)


def _build(options: argparse.Namespace) -> int:
    from hva_host.cli.output import print_json, progress
    from hva_images import ensure_image

    image = ensure_image(options.image, base_dir=Path.cwd(), progress=progress)
    if options.json:
        print_json(_facts(image))
    else:
        print(f"{image.name}: {image.directory}")
    return 0


def _list(options: argparse.Namespace) -> int:
    from hva_host.cli.output import cell, print_json, show, table
    from hva_images import list_images
    from hvaqemu.units import format_size

    images = list_images()
    if options.json:
        print_json([_facts(image) for image in images])
        return 0
    if not images:
        print("no image is built; build one with: hvaqemu image build")
        return 0
    listed = table("NAME", "DIGEST", "#DISK", "#OCCUPIES", "#PACKAGES", "DIRECTORY")
    for image in images:
        facts = _facts(image)
        listed.add_row(
            cell(image.name),
            image.digest[:12],
            format_size(image.size_bytes),
            format_size(facts["occupies_bytes"]),
            str(len(image.packages)),
            cell(image.directory),
        )
    show(listed)
    return 0


def _facts(image: GuestImage) -> dict[str, Any]:
    paths = (image.kernel, image.initrd, image.root)
    return {
        "name": image.name,
        "digest": image.digest,
        "directory": str(image.directory),
        "size_bytes": image.size_bytes,
        "occupies_bytes": sum(path.stat().st_blocks * 512 for path in paths),
        "sha256": dict(image.sha256),
        "packages": dict(image.packages),
    }
