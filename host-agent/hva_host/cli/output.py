"""Tables, JSON and progress of the subcommands."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from hva_host.cli.text import one_line, plain
from hvaqemu.errors import ConfigError

LOUD = "bold white on red"
WARN = "yellow"


def print_json(value: Any) -> None:
    """A value as JSON: ASCII only, so that no text of a guest acts on a terminal."""
    print(json.dumps(value, indent=2).replace("\x7f", "\\u007f"))


def checked_json(path: Path | None) -> bool:
    """Whether a command's ``--json`` is standard output; to be called before there is anything to lose.

    :raise ConfigError: it is a file that could not be written.
    """
    if path is None or path == Path("-"):
        return path is not None
    if path.is_dir():
        raise ConfigError(f"--json {path}: is a folder", "name a file in it, or - for standard output")
    if not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
        raise ConfigError(f"--json {path}: its folder is not there or not writable", "choose another place")
    return False


def show(*parts: RenderableType) -> None:
    """Print tables and texts; nothing is cut when the output is no terminal."""
    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = max(console.width, 200)
    for part in parts:
        console.print(part)


def progress(text: str) -> None:
    """A line about what goes on, beside the output."""
    print(one_line(text), file=sys.stderr, flush=True)


def cell(text: object, style: str = "") -> Text:
    """Text for a table, without markup, harmless."""
    return Text(plain(str(text)), style=style)


def table(*columns: str) -> Table:
    """An empty table; columns whose title begins with "#" hold numbers."""
    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in columns:
        number = column.startswith("#")
        made.add_column(column.removeprefix("#"), justify="right" if number else "left", no_wrap=True)
    return made


def pairs(rows: Iterable[tuple[str, object]]) -> Table:
    """Names and values."""
    made = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    made.add_column(style="bold")
    made.add_column(overflow="fold")
    for name, value in rows:
        made.add_row(cell(name), value if isinstance(value, Text) else cell(value))
    return made
