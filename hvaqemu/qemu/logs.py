"""What QEMU and guests write, made fit for a terminal."""

from __future__ import annotations

import os
from pathlib import Path


def printable(text: str) -> str:
    """``text`` without control characters: each becomes a visible escape. Line ends and tabs stay."""
    return "".join(
        letter if letter.isprintable() or letter in "\n\t" else letter.encode("unicode_escape").decode()
        for letter in text
    )


def tail(path: Path, size: int = 4096, since: int = 0) -> str:
    """The whole lines among the last ``size`` bytes of a log, printable; "" where there is no log.

    :param since: a size the log once had, in bytes: what was in it then is left out.
    """
    try:
        with path.open("rb") as file:
            length = file.seek(0, os.SEEK_END)
            size = min(size, length - since) if length >= since else size
            file.seek(max(0, length - size))
            raw = file.read(size)
    except OSError:
        return ""
    # A serial console ends its lines with both.
    text = raw.decode(errors="replace").replace("\r\n", "\n")
    if length > size and length - size != since:
        text = text.partition("\n")[2] or text
    return printable(text).strip()


def one_line(text: str, lines: int = 3) -> str:
    """The last lines of ``text`` as one."""
    return " | ".join(text.split("\n")[-lines:])
