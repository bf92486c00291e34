"""``hvaqemu qmp``: a command for QEMU's monitor."""

from __future__ import annotations

import argparse
import json
from typing import Any

from hva_host.cli.arguments import Subparsers, add_command, add_name, duration

_DESCRIPTION = """\
Send a command to the monitor of a VM's QEMU, past a guard, and print what QEMU returns as JSON.
Reclaim pauses by itself while a migration, a snapshot or a dump is under way. What would make
discarding unsafe (vhost-user, VFIO, hot-plugged memory, direct I/O, postcopy, background
snapshots, …) is refused with a reason. For a stream of events, give QEMU a second monitor:
`qemu_args: [-qmp, "unix:/path,server=on,wait=off"]` in the VM's file.
"""
_EXAMPLES = """\
hvaqemu qmp quickstart query-status
hvaqemu qmp quickstart migrate --arguments '{"uri": "tcp:otherhost:4444"}'
"""


def add_parser(subparsers: Subparsers) -> None:
    parser = add_command(subparsers, "qmp", "send a command to QEMU's monitor", _DESCRIPTION, _EXAMPLES)
    add_name(parser)
    parser.add_argument("qmp_command", metavar="COMMAND", help="a QMP command, for example query-status")
    parser.add_argument(
        "--arguments", type=_object, default={}, metavar="JSON", help="the command's arguments, a JSON object"
    )
    parser.add_argument(
        "--timeout", type=duration, default=60.0, metavar="TIME", help="how long to wait for QEMU (default: 60s)"
    )


def run(options: argparse.Namespace) -> int:
    from hva_host.cli.output import print_json
    from hva_host.cli.session import with_agent

    print_json(
        with_agent(lambda client: client.qmp(options.name, options.qmp_command, options.arguments, options.timeout))
    )
    return 0


def _object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"not JSON: {error}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError("must be a JSON object, for example '{\"value\": 1}'")
    return value
