"""``hvaqemu top``: all VMs, live."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from hva_host.cli.arguments import Subparsers, add_command, add_json, duration

if TYPE_CHECKING:
    from pathlib import Path

_DESCRIPTION = """\
Show all VMs as they are now: where each guest's memory is, how often it wants discarded pages back and
how long it waits for them, its last epoch and its last events. Keys pause the selected VM or let it
go on, reclaim its memory, restore it. Without a terminal, or with --once, it looks twice and prints.
"""


def add_parser(subparsers: Subparsers) -> None:
    examples = "hvaqemu top\nhvaqemu top --interval 5s\nhvaqemu top --once\nhvaqemu top --json"
    parser = add_command(subparsers, "top", "show all VMs, live", _DESCRIPTION, examples)
    parser.add_argument(
        "--interval", type=duration, default=1.0, metavar="TIME", help="between two looks (default: 1s)"
    )
    parser.add_argument("--once", action="store_true", help="look twice, print, and end")
    add_json(parser, "the same as JSON")


def run(options: argparse.Namespace) -> int:
    from hva_host.cli.terminal import is_usable
    from hvaqemu.paths import runtime_dir

    if options.once or options.json or not is_usable():
        return _once(runtime_dir(), options.interval, options.json)
    from hva_host.cli.loop import run_async
    from hva_host.cli.top_live import live

    run_async(live(runtime_dir(), options.interval))
    return 0


def _once(runtime: Path, interval: float, as_json: bool) -> int:
    from hva_host.cli.loop import run_async
    from hva_host.cli.output import print_json, show
    from hva_host.cli.states import exit_code
    from hva_host.cli.top_live import NO_VM, two_looks
    from hva_host.cli.top_screen import attention, head, listed
    from hva_host.cli.top_view import top_view

    before, now = run_async(two_looks(runtime, interval))
    view = top_view(before, now)
    if as_json:
        print_json(view.model_dump(mode="json"))
    elif view.vms:
        show(head(view), listed(view, None, ascii_only=True), *attention(view))
    else:
        print(NO_VM)
    return exit_code(now.vms)
