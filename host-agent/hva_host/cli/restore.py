"""``hvaqemu restore``: bring every page back."""

from __future__ import annotations

import argparse

from hva_host.cli.arguments import Subparsers, add_command, add_json, add_name

_DESCRIPTION = """\
Make every page of a VM's memory resident again, so that nothing depends on the pager or on disk
layers. Needed before a migration or savevm, and to take a VM out of hvaqemu's care.
"""


def add_parser(subparsers: Subparsers) -> None:
    parser = add_command(
        subparsers, "restore", "make all of a VM's memory resident", _DESCRIPTION, "hvaqemu restore quickstart"
    )
    add_name(parser)
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    from hva_host.cli.output import print_json
    from hva_host.cli.session import with_agent
    from hvaqemu.pages import PAGE_SIZE
    from hvaqemu.units import format_size

    pages = with_agent(lambda client: client.restore(options.name))
    if options.json:
        print_json({"pages": pages})
    else:
        print(
            f"{options.name}: {pages:,} pages ({format_size(pages * PAGE_SIZE)}) are resident again; none is discarded"
        )
    return 0
