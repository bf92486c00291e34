"""Text of guests, files and peers on its way to a terminal: nothing in it may act, all of it may be seen.

Escape sequences, C1 controls, bidirectional overrides and characters nobody sees come out as visible escapes. Markup
of the terminal library is no concern here: it only ever gets :class:`rich.text.Text`, which has none.
"""

from __future__ import annotations

import codecs
import sys

from hvaqemu.qemu.logs import printable


def plain(text: str | bytes) -> str:
    """``text`` fit for a terminal, with its lines. Bytes are UTF-8; those that are not come out as ``\\xNN``."""
    if isinstance(text, bytes):
        text = text.decode(errors="backslashreplace")
    return printable(text.replace("\r\n", "\n"))


def one_line(text: str | bytes) -> str:
    """The same as a single line."""
    return " | ".join(line for line in plain(text).replace("\t", " ").split("\n") if line.strip())


class Plain:
    """:func:`plain` for text that comes in pieces, cut anywhere."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("backslashreplace")
        self._held = ""

    def feed(self, piece: bytes, *, final: bool = False) -> str:
        """What can be shown after ``piece``; a line end or character that may be incomplete is held back."""
        text = self._held + self._decoder.decode(piece, final)
        self._held = "\r" if text.endswith("\r") and not final else ""
        return plain(text.removesuffix(self._held))


def write(data: bytes, *, error: bool = False) -> None:
    """A guest's output to ours: escaped for a terminal, byte for byte for anything else."""
    stream = sys.stderr if error else sys.stdout
    if stream.isatty():
        stream.write(plain(data))
    else:
        stream.flush()
        stream.buffer.write(data)
    stream.flush()
