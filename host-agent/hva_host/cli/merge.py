"""``hvaqemu merge``: make a chain of frozen files short again."""

from __future__ import annotations

import argparse

from hva_host.cli.arguments import Subparsers, add_command, add_json, add_name

_DESCRIPTION = """\
Merge the frozen files of a VM's disk, or of each disk, into the lowest of them. Pages that depend on
that one become resident first. Merged files are deleted once no page depends on them. Interrupted, or
if it moves nothing for a minute (`freeze: {patience}`), it is taken back, and the chain stays as it was.
Done by itself when there are more than `freeze: {depth}`.
"""
_EXAMPLES = """
hvaqemu merge example
hvaqemu merge example root --json
"""


def add_parser(subparsers: Subparsers) -> None:
    parser = add_command(subparsers, "merge", "make a chain of frozen files short again", _DESCRIPTION, _EXAMPLES)
    add_name(parser)
    parser.add_argument("disk", metavar="DISK", nargs="?", help="root or swap (default: each)")
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    from hva_host.cli.freeze import show
    from hva_host.cli.output import print_json
    from hva_host.cli.session import with_agent

    merged = with_agent(lambda client: client.merge(options.name, options.disk, show))
    if options.json:
        print_json({"merged": merged})
    else:
        print(f"{options.name}: {len(merged)} frozen file{'s' if len(merged) != 1 else ''} merged away")
    return 0
