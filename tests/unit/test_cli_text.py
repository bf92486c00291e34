from __future__ import annotations

import io
import os
import pty
import sys
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from hva_host.cli.output import cell, pairs, print_json, table
from hva_host.cli.text import Plain, one_line, plain, write

#: Clears the screen, sets the title, C1 CSI, turns text around, hides letters, a BOM, unassigned and private letters.
HOSTILE = "\x1b[2J\x1b]0;title\x07\x9b31m\u202eevil\u2066x\u200b\u200fy\ufeff\x7f\x00\x08\ue000\U000e0041"


@given(st.text() | st.binary())
def test_nothing_that_acts_on_a_terminal_gets_through(text: str | bytes) -> None:
    for letter in plain(text):
        assert letter in "\n\t" or letter == " " or unicodedata.category(letter)[0] not in "CZ"
    assert "\n" not in one_line(text)


@given(st.text(alphabet=st.characters(categories=["L", "N", "P", "S"]) | st.sampled_from(" \n\t")))
def test_ordinary_text_is_left_alone(text: str) -> None:
    assert plain(text) == text == plain(text.encode())


def test_what_is_taken_away_can_be_seen() -> None:
    assert plain(HOSTILE) == (
        r"\x1b[2J\x1b]0;title\x07\x9b31m\u202eevil\u2066x\u200b\u200fy\ufeff\x7f\x00\x08\ue000\U000e0041"
    )
    assert plain(b"\x1b\xff\xc3\xa4\r\n") == "\\x1b\\xff\u00e4\n"
    assert plain("progress\rover") == r"progress\rover"
    assert plain("\ud800") == r"\ud800"


@given(st.text(alphabet=st.sampled_from("a\u00e4\u20ac\U0001f600\r\n\x1b\u202e")), st.data())
def test_pieces_come_out_as_the_whole_does(text: str, data: st.DataObject) -> None:
    raw, out, pieces = text.encode(), "", Plain()
    while raw:
        size = data.draw(st.integers(1, len(raw)))
        out += pieces.feed(raw[:size])
        raw = raw[size:]
    assert out + pieces.feed(b"", final=True) == plain(text)


def test_tables_obey_no_markup_and_no_escapes() -> None:
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, width=200, color_system="standard")
    listed = table("NAME", "#N")
    listed.add_row(cell("[red]name[/red] [link=x]:smile:" + HOSTILE), "1")
    console.print(listed)
    console.print(pairs([("key", "[bold]" + HOSTILE)]))
    text = output.getvalue()
    assert "[red]name[/red] [link=x]:smile:" in text
    assert "[bold]" in text
    assert "\x1b[2J" not in text
    assert "\x1b]" not in text
    assert not set(text) & set("\x07\x9b\u202e\u200b\x08\x7f")


def test_json_is_ascii_without_controls(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"text": HOSTILE + "\u00e4"})
    said = capsys.readouterr().out
    assert said.isascii()
    assert not [letter for letter in said if not letter.isprintable() and letter != "\n"]


def test_a_pipe_gets_the_bytes_and_a_terminal_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = b"\x1b[31mred\xff\r\n"
    read_end, write_end = os.pipe()
    with os.fdopen(write_end, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        write(raw)
    with os.fdopen(read_end, "rb") as pipe:
        assert pipe.read() == raw
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w", errors="backslashreplace") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        write(raw, error=True)
        assert os.read(ours, 100) == b"\\x1b[31mred\\xff\r\n"
    os.close(ours)
