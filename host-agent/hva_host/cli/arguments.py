"""What several subcommands' arguments have in common."""

from __future__ import annotations

import argparse
from typing import Any

from hvaqemu.units import parse_duration

Subparsers = Any


def add_command(subparsers: Subparsers, name: str, summary: str, description: str, examples: str) -> Any:
    """A subcommand's parser.

    :param summary: one line for the list of commands.
    :param description: what it does, for its own --help.
    :param examples: command lines, each on a line of its own.
    """
    lines = "\n".join(f"  {line}" for line in examples.strip().splitlines())
    return subparsers.add_parser(
        name,
        help=summary,
        description=description,
        epilog=f"example{'s' if chr(10) in lines else ''}:\n{lines}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def add_name(parser: argparse.ArgumentParser) -> None:
    """The argument NAME."""
    parser.add_argument("name", metavar="NAME", help="the VM's name, as `hvaqemu ls` shows it")


def add_json(parser: argparse.ArgumentParser, what: str = "print JSON instead of text") -> None:
    """The option --json."""
    parser.add_argument("--json", action="store_true", help=what)


def duration(text: str) -> float:
    """Seconds, as an argument's type."""
    try:
        seconds = parse_duration(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    if seconds <= 0:
        raise argparse.ArgumentTypeError("must be more than 0")
    return seconds


def positive(text: str) -> int:
    """A whole number above 0, as an argument's type."""
    if not text.isascii() or not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)
