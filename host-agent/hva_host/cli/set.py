"""``hvaqemu set``: change how a VM's memory is reclaimed."""

from __future__ import annotations

import argparse

from hva_host.cli.arguments import Subparsers, add_command, add_json, add_name

_DESCRIPTION = """\
Change how a VM's memory is reclaimed, from now on and for as long as it runs. The guest is not
touched. Keys are those of `reclaim` in a VM file; values are written as there. Without KEY=VALUE,
all of them are shown.
"""
_EXAMPLES = """
hvaqemu set example reclaim.mode=proactive
hvaqemu set example mode=target target=200M states=unused,volatile,potential
hvaqemu set example refault_budget=0.5%/min
hvaqemu set example
"""


def add_parser(subparsers: Subparsers) -> None:
    parser = add_command(subparsers, "set", "change how a VM's memory is reclaimed", _DESCRIPTION, _EXAMPLES)
    add_name(parser)
    parser.add_argument("changes", metavar="KEY=VALUE", nargs="*", help="what to change")
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    from hva_host.cli.output import pairs, print_json, show
    from hva_host.cli.session import with_agent

    reclaim = with_agent(lambda client: client.set(options.name, options.changes))
    shown = reclaim.model_dump(mode="json")
    if options.json:
        print_json(shown)
    else:
        show(pairs((f"reclaim.{key}", _text(key, value)) for key, value in shown.items() if value is not None))
    return 0


def _text(key: str, value: object) -> str:
    """A value as it can be given again."""
    from hvaqemu.units import format_size

    if isinstance(value, int) and key in ("min_resident", "target"):
        return format_size(value)
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)
