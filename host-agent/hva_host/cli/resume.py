"""``hvaqemu resume``: let a held VM go on."""

from __future__ import annotations

import argparse

from hva_host.cli.arguments import Subparsers, add_command, add_json, add_name

_DESCRIPTION = """\
Try again to serve the pages that hold a VM (`hvaqemu ls` shows it HELD): the guest stands still
rather than read wrong bytes, because a file it depends on has changed or can not be read. Put the
file right first. Exit code 1 as long as pages are held.
"""


def add_parser(subparsers: Subparsers) -> None:
    parser = add_command(subparsers, "resume", "let a HELD VM go on", _DESCRIPTION, "hvaqemu resume quickstart")
    add_name(parser)
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    from hva_host.cli.output import print_json, progress
    from hva_host.cli.session import with_agent

    held = with_agent(lambda client: client.resume(options.name))
    if options.json:
        print_json({"held": held})
    elif held:
        progress(f"hvaqemu: {options.name}: {held} pages are still held (`hvaqemu status {options.name}` says why)")
    else:
        print(f"{options.name}: no page is held")
    return 1 if held else 0
