"""``hvaqemu freeze``: make a layer of what a guest wrote."""

from __future__ import annotations

import argparse
from typing import Any

from hva_host.cli.arguments import Subparsers, add_command, add_json, add_name

_DESCRIPTION = """\
Make a layer of what a guest has written to its disk so far, so that the clean copies of it in the
guest's memory can be discarded too. The guest writes on to a fresh file and notices nothing. All
disks of a VM are frozen at one moment, or only DISK; one that nothing was written to since the last
time is passed over. Returns once the layer is indexed and in use; interrupted, it goes on by itself.
"""
_EXAMPLES = """
hvaqemu freeze example
hvaqemu freeze example root --json
"""


def add_parser(subparsers: Subparsers) -> None:
    parser = add_command(subparsers, "freeze", "make a layer of what a guest wrote", _DESCRIPTION, _EXAMPLES)
    add_name(parser)
    parser.add_argument("disk", metavar="DISK", nargs="?", help="root or swap (default: all)")
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    from hva_host.cli.output import print_json
    from hva_host.cli.session import with_agent
    from hvaqemu.units import format_duration, format_size

    done = with_agent(lambda client: client.freeze(options.name, options.disk, show))
    if options.json:
        print_json([disk.model_dump(mode="json") for disk in done])
    else:
        for disk in done:
            if disk.layer is None:
                print(f"{options.name}: disk {disk.disk} not frozen: nothing was written to it since the last time")
                continue
            took = f"in {format_duration(disk.seconds)}, indexed in {format_duration(disk.index_seconds)}"
            print(f"{options.name}: disk {disk.disk} frozen: {format_size(disk.bytes)}, {took}")
    return 0


def show(event: str, data: dict[str, Any]) -> None:
    """Print what lasting work on disks has come to."""
    from hva_host.cli.output import progress
    from hvaqemu.units import format_size

    words = {"LAYER_INDEXING": "indexed", "MERGING": "merged"}
    if event in words:
        done, size = int(data["done"]), int(data["size"])
        progress(f"{format_size(done)} of {format_size(size)} {words[event]}")
