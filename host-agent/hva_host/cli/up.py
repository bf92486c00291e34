"""``hvaqemu up``: start a VM that stays."""

from __future__ import annotations

import argparse
from pathlib import Path

from hva_host.cli.arguments import Subparsers, add_command, add_json, duration

_DESCRIPTION = """\
Start a VM and leave it running. Returns when the guest's agent is connected, so that the VM can be
asked for its memory; else it says why, and nothing is left behind. The image is built if need be.
"""
_EXAMPLES = """
hvaqemu up examples/vm.yaml
hvaqemu up examples/vm.yaml --timeout 2m
hvaqemu up examples/vm.yaml --dry-run
"""


def add_parser(subparsers: Subparsers) -> None:
    parser = add_command(subparsers, "up", "start a VM that stays", _DESCRIPTION, _EXAMPLES)
    parser.add_argument("file", metavar="VM.yaml", type=Path, help="describes the VM; a scenario does too")
    parser.add_argument(
        "--timeout", metavar="TIME", type=duration, help="the guest must have booted by then (default: the file's)"
    )
    parser.add_argument("--dry-run", action="store_true", help="print QEMU's command line and start nothing")
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    from hvaqemu.config import load_vm

    config = load_vm(options.file)
    if options.timeout is not None:
        config = config.model_copy(update={"boot_timeout": options.timeout})
    if options.dry_run:
        import shlex

        from hva_host.agent.fleet import prepare_command

        print(shlex.join(prepare_command(config)))
        return 0

    from hva_host.cli.output import print_json, progress
    from hva_host.cli.session import with_agent

    status = with_agent(lambda client: client.up(config, progress))
    if options.json:
        print_json(status.model_dump(mode="json"))
    else:
        progress(f"{status.name} is up, process {status.pid}: {status.guest_kernel}")
    return 0
