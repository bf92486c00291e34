"""``hvaqemu events``: what happened to a VM."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from hva_host.cli.arguments import Subparsers, add_command, add_json, add_name

if TYPE_CHECKING:
    from datetime import datetime

    from hva_host.agent.event_files import EventReader, LoggedEvent

_FOLLOW_SECONDS = 0.2
_DESCRIPTION = """\
Print what the host agent recorded of a VM, oldest first: states, epochs, holds, freezes, pagers lost
and replaced. The record outlives the VM and its host agent, and is read without either. Of events
that repeat only some are recorded, with how many were left out before. Times are UTC.
"""


def add_parser(subparsers: Subparsers) -> None:
    examples = (
        "hvaqemu events quickstart --since 10m\n"
        "hvaqemu events quickstart --follow\n"
        "hvaqemu events quickstart --since 2026-03-01T12:00:00Z --json"
    )
    parser = add_command(subparsers, "events", "show what happened to a VM", _DESCRIPTION, examples)
    add_name(parser)
    parser.add_argument("-f", "--follow", action="store_true", help="go on until Ctrl-C")
    parser.add_argument(
        "--since",
        type=_since,
        metavar="WHEN",
        help="only what is newer: a time like 10m (so long ago), or a moment by RFC 3339",
    )
    add_json(parser, "print the recorded lines, each a JSON object")


def run(options: argparse.Namespace) -> int:
    from hva_host.agent.event_files import EventReader, events_folder
    from hva_host.cli.loop import run_async

    with EventReader(events_folder(), options.name) as reader:
        run_async(_show(reader, options.since, options.follow, options.json))
    return 0


async def _show(reader: EventReader, since: datetime | None, follow: bool, raw: bool) -> None:
    import asyncio

    while True:
        for event in reader.read():
            if since is None or event.time >= since:
                print(event.raw.decode("ascii", errors="backslashreplace") if raw else line(event))
        sys.stdout.flush()
        if not follow:
            return
        # A file has no event for "grew" that would work everywhere a state directory may be.
        await asyncio.sleep(_FOLLOW_SECONDS)


def line(event: LoggedEvent) -> str:
    """An event as one line for people."""
    from hva_host.agent.event_files import format_time
    from hva_host.cli.event_text import describe
    from hva_host.cli.text import one_line

    more = f" (and {event.untold} more before it)" if event.untold else ""
    return f"{format_time(event.time)}  {one_line(event.event):15}  {describe(event.event, event.data)}{more}"


def _since(text: str) -> datetime:
    from datetime import UTC, datetime, timedelta

    from hvaqemu.units import parse_duration

    try:
        return datetime.now(UTC) - timedelta(seconds=parse_duration(text))
    except (ValueError, OverflowError):
        pass
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither a time like 10m nor a moment like 2026-03-01T12:00:00Z"
        ) from error
    if moment.tzinfo is None:
        raise argparse.ArgumentTypeError(f"{text!r} has no time zone; put a Z behind it for UTC")
    return moment
