"""``hvaqemu report``: one VM as a page."""

from __future__ import annotations

import argparse
from pathlib import Path

from hva_host.cli.arguments import Subparsers, add_command, add_name

_DESCRIPTION = """\
Write a report of a VM that is up as one HTML file that needs nothing else: guest RAM over time since
the host agent has it, a map of it, how long refaults were waited for, epochs, costs, configuration
and versions. Prints the file's path.
"""


def add_parser(subparsers: Subparsers) -> None:
    examples = "hvaqemu report quickstart\nhvaqemu report quickstart -o /tmp/quickstart.html"
    parser = add_command(subparsers, "report", "write a report of one VM as a page", _DESCRIPTION, examples)
    add_name(parser)
    parser.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        type=Path,
        help="where to; an older file is replaced (default: NAME.html here)",
    )


def run(options: argparse.Namespace) -> int:
    from hva_host.cli.session import with_agent
    from hva_host.cli.text import one_line
    from hva_host.report.files import write_page
    from hva_host.report.html.page import page
    from hva_host.report.html.shown import of_vm

    report = with_agent(lambda client: client.report(options.name))
    path = options.output if options.output is not None else Path(f"{report.status.name}.html")
    write_page(page([of_vm(report)]), path)
    print(one_line(str(path)))
    return 0
