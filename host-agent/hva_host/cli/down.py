"""``hvaqemu down``: end a VM."""

from __future__ import annotations

import argparse

from hva_host.cli.arguments import Subparsers, add_command, add_name

_DESCRIPTION = """\
End a VM: ask the guest to shut down, then QEMU to quit, then the kernel to kill it. What the guest
wrote to its root disk is deleted with the VM, unless it is kept (here, earlier, or by `keep_disks` in
its file): then the next VM of that name boots from it. Disks of its file's `extra_disks` stay.
"""
_EXAMPLES = """
hvaqemu down quickstart
hvaqemu down example --keep-disks
hvaqemu down example --delete-disks
"""


def add_parser(subparsers: Subparsers) -> None:
    parser = add_command(subparsers, "down", "end a VM", _DESCRIPTION, _EXAMPLES)
    add_name(parser)
    either = parser.add_mutually_exclusive_group()
    either.add_argument(
        "--keep-disks", dest="keep_disks", action="store_true", default=None, help="keep what the guest wrote"
    )
    either.add_argument(
        "--delete-disks", dest="keep_disks", action="store_false", help="delete it; also of a VM that is down already"
    )


def run(options: argparse.Namespace) -> int:
    from hva_host.cli.output import progress
    from hva_host.cli.session import with_agent

    how = with_agent(lambda client: client.down(options.name, options.keep_disks))
    progress(f"{options.name} is down: {how}")
    return 0
