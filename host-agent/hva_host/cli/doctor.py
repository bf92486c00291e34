"""``hvaqemu doctor``: is this host fit for it?"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from hva_host.cli.arguments import Subparsers, add_command, add_json

if TYPE_CHECKING:
    from rich.console import RenderableType

    from hva_host.doctor import Check

_DESCRIPTION = """\
Check what this host has of what hvaqemu needs: kernel, permission for userfaultfd, QEMU and its
accelerators, Debian tools, room. Each check tries the real thing; each that fails says what to do.
Exit code 1 if something is missing that hvaqemu can not do without.
"""


def add_parser(subparsers: Subparsers) -> None:
    examples = "hvaqemu doctor\nhvaqemu doctor --json"
    parser = add_command(subparsers, "doctor", "check what this host has and lacks", _DESCRIPTION, examples)
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    from hva_host.cli.output import print_json, show
    from hva_host.doctor import examine

    checks = examine()
    fit = all(check.ok for check in checks if check.needed)
    if options.json:
        print_json({"ok": fit, "checks": [check.model_dump(mode="json") for check in checks]})
    else:
        show(*render(checks))
        print("this host is fit" if fit else "this host lacks something; see FAIL above")
    return 0 if fit else 1


def render(checks: list[Check]) -> list[RenderableType]:
    """The checks, what to do below each that fails."""
    from rich.table import Table

    from hva_host.cli.output import LOUD, cell
    from hva_host.cli.text import one_line

    made = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    made.add_column()
    made.add_column(no_wrap=True)
    made.add_column(overflow="fold")
    for check in checks:
        lacking = cell("FAIL", LOUD) if check.needed else cell("no", "yellow")
        found = cell(one_line(check.found))
        if check.advice:
            found.append(f"\n{one_line(check.advice)}", style="bold")
        made.add_row(cell("ok", "green") if check.ok else lacking, cell(check.name), found)
    return [made]
