"""``hvaqemu reclaim``: give a VM's unneeded memory back to the host."""

from __future__ import annotations

import argparse
from typing import Any

from hva_host.cli.arguments import Subparsers, add_command, add_json, add_name, positive

_DESCRIPTION = """\
Discard pages whose content the guest does not need (unused: free pages) or that are copies of its
disk (volatile: clean page cache; potential, where asked for: clean page cache that a process has
mapped shared and writable, taken after volatile); if asked, compress cold pages of any other kind
into the VM's store (stable). Runs epochs until one gains less than 1 %. The guest notices nothing:
what it touches again comes back with the right bytes.
"""
_EXAMPLES = """
hvaqemu reclaim quickstart
hvaqemu reclaim quickstart --states unused --epochs 2
hvaqemu reclaim quickstart --states unused,volatile,potential,stable
"""


def add_parser(subparsers: Subparsers) -> None:
    parser = add_command(subparsers, "reclaim", "give a VM's unneeded memory to the host", _DESCRIPTION, _EXAMPLES)
    add_name(parser)
    known = "which pages: some of unused, volatile, potential and stable (default: unused,volatile)"
    parser.add_argument("--states", metavar="STATES", default="unused,volatile", help=known)
    parser.add_argument("--epochs", metavar="N", type=positive, help="exactly so many epochs")
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    from hva_host.cli.output import print_json, progress
    from hva_host.cli.session import with_agent
    from hvaqemu.pages import PAGE_SIZE
    from hvaqemu.units import format_duration, format_size

    states = _states(options.states)

    def on_epoch(stats: dict[str, Any]) -> None:
        discarded = int(stats["discarded"])
        progress(
            f"epoch {stats['number']}: {discarded:,} of {stats['candidates']:,} candidates discarded, "
            f"{format_size(discarded * PAGE_SIZE)}, in {format_duration(stats['seconds']['total'])}"
            + (f"; {stats['note']}" if stats["note"] else "")
        )

    result = with_agent(lambda client: client.reclaim(options.name, states, options.epochs, on_epoch))
    if options.json:
        print_json(result.model_dump(mode="json"))
    else:
        store = f" and a store of {format_size(result.store_after_bytes)}" if result.store_after_bytes else ""
        print(
            f"{options.name}: backing {format_size(result.backing_before_bytes)} -> "
            f"{format_size(result.backing_after_bytes)}{store}; {result.discarded:,} pages discarded in "
            f"{len(result.epochs)} epoch{'s' if len(result.epochs) != 1 else ''}, {format_duration(result.seconds)}"
        )
    return 0


def _states(text: str) -> list[str]:
    from hvaqemu.errors import ConfigError
    from hvaqemu.reclaim_config import ReclaimState

    states = [state.strip() for state in text.split(",")]
    known = [str(state) for state in ReclaimState]
    if wrong := [state for state in states if state not in known]:
        raise ConfigError(f"--states: {wrong[0]!r} is not a page state", f"write one or more of {','.join(known)}")
    return list(dict.fromkeys(states))
