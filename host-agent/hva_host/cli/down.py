"""``hvaqemu down``: end a VM."""

from __future__ import annotations

import argparse

from hva_host.cli.arguments import Subparsers, add_command, add_name

_DESCRIPTION = """\
End a VM: ask the guest to shut down, then QEMU to quit, then the kernel to kill it. What the guest
wrote to its root disk is deleted with the VM; disks of its file's `extra_disks` stay.
"""


def add_parser(subparsers: Subparsers) -> None:
    parser = add_command(subparsers, "down", "end a VM", _DESCRIPTION, "hvaqemu down quickstart")
    add_name(parser)


def run(options: argparse.Namespace) -> int:
    from hva_host.cli.output import progress
    from hva_host.cli.session import with_agent

    how = with_agent(lambda client: client.down(options.name))
    progress(f"{options.name} is down: {how}")
    return 0
