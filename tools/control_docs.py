"""Writes docs/control.md: every command and event of the control socket, from the code that serves them.

python -m tools.control_docs [FILE]
"""

from __future__ import annotations

import enum
import inspect
import json
import re
import sys
import types
import typing
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from hva_host.agent.control_commands import Command, CommandTable, to_wire
from hva_host.agent.events import EVENTS, Event
from hvaqemu.fields import Config, Count, Flag, HostPath, Name, Rate, Seconds, Share, Size, Text
from tools.control_examples import COMMANDS, EVENTS_LIKE

TARGET = Path(__file__).parents[1] / "docs/control.md"
_WIDTH = 120
_INTRO = """\
# Control socket: commands, events, records

Made from the code by `make docs`; do not edit. What the socket is, who may use it and how errors look is in
[operations.md](operations.md#the-control-socket). `->` is what a client sends, `<-` what the host agent answers.

Sizes are bytes, times are seconds and pages are pages of 4 KiB, unless a name says otherwise. Where an argument is a
size or a duration, text does too ("512M", "30s"). Text may be a guest's: escape it before printing. Examples leave out
what is as it is by default.
"""
#: Kinds of values of users' files, in words.
_WORDS: tuple[tuple[Any, str], ...] = (
    (Name, "name"), (Text, "text"), (Size, "size"), (Seconds, "duration"), (Flag, "boolean"),
    (Count, "integer, 1 or more"), (Share, 'share ("5%")'), (Rate, 'rate ("0.2%/min")'), (HostPath, "path"),
)  # fmt: skip
_SIMPLE: dict[Any, str] = {
    str: "text",
    int: "integer",
    float: "number",
    bool: "boolean",
    bytes: "text in base64",
    Path: "path",
    Any: "anything",
}
_COMMENT = re.compile(r"^\s*#:\s?(.*)$")
_FIELD = re.compile(r"^\s*(\w+)\s*:")


def render() -> str:
    """The whole page."""
    # Nothing is executed: the table is asked what there is.
    table = CommandTable(None, lambda _event, _data: None, lambda: None, lambda: None)  # type: ignore[arg-type]
    records = _Records()
    commands = [line for command in table.all for line in _command(command, records)]
    events = [line for name, kind in sorted(EVENTS.items()) for line in _event(name, kind, records)]
    parts = [_INTRO, "## Commands\n", *commands, "## Events\n", *events, "## Records\n", *records.described()]
    return "\n".join(parts).rstrip() + "\n"


class _Records:
    """Records that something described refers to."""

    def __init__(self) -> None:
        self._wanted: dict[str, type[BaseModel]] = {}

    def link(self, record: type[BaseModel]) -> str:
        """A reference to a record, which is described at the end."""
        if issubclass(record, Config):
            return f"[{record.__name__}](operations.md#vm-files)"
        self._wanted[record.__name__] = record
        return f"[{record.__name__}](#{record.__name__.lower()})"

    def described(self) -> Iterator[str]:
        """Every record that was referred to, and those it refers to."""
        done: dict[str, list[str]] = {}
        while missing := self._wanted.keys() - done.keys():
            for name in missing:
                record = self._wanted[name]
                done[name] = [f"### {name}\n", f"{_docstring(record)}\n", *_fields(record, self, "field")]
        for name in sorted(done):
            yield from done[name]


def _command(command: Command, records: _Records) -> Iterator[str]:
    yield f"### {command.name}\n"
    yield f"{_docstring(command.run)}\n"
    if command.detached:
        yield "Goes on to its end if who asked for it hangs up.\n"
    yield from _fields(command.arguments, records, "argument")
    returns = typing.get_type_hints(command.run, include_extras=True)["return"]
    yield f"Returns {_type(returns, records)}.\n"
    arguments, returned = COMMANDS[command.name]
    asked: dict[str, Any] = {"execute": command.name}
    if arguments:
        asked["arguments"] = arguments
    yield "```"
    yield f"-> {_json(asked)}"
    yield f"<- {_json({'return': to_wire_briefly(returned)})}"
    yield "```\n"


def _event(name: str, kind: type[Event], records: _Records) -> Iterator[str]:
    yield f"### {name}\n"
    yield f"{_docstring(kind)}{' A warning in agent.log.' if kind.loud else ''}\n"
    yield from _fields(kind, records, "data")
    data = to_wire_briefly(EVENTS_LIKE[name])
    yield "```"
    yield f"<- {_json({'event': name, 'data': data, 'timestamp': {'seconds': 1772366400, 'microseconds': 250000}})}"
    yield "```\n"


def to_wire_briefly(returned: object) -> Any:
    """As it is sent, without what is as it is by default."""
    if isinstance(returned, list):
        return [to_wire_briefly(each) for each in returned]
    assert isinstance(returned, BaseModel)
    whole, changed = to_wire(returned), returned.model_dump(mode="json", by_alias=True, exclude_defaults=True)
    return {key: changed.get(key, value) for key, value in whole.items() if key in changed}


def _fields(record: type[BaseModel], records: _Records, title: str) -> Iterator[str]:
    hints, comments = typing.get_type_hints(record, include_extras=True), _comments(record)
    if not record.model_fields:
        return
    yield f"| {title} | type | default | meaning |"
    yield "|---|---|---|---|"
    for name, field in record.model_fields.items():
        default = "" if field.default is PydanticUndefined else f"`{_default(field.default)}`"
        shown = field.serialization_alias or name
        yield f"| `{shown}` | {_type(hints[name], records)} | {default} | {comments.get(name, '')} |"
    yield ""


def _default(value: object) -> str:
    if isinstance(value, BaseModel):
        return json.dumps(value.model_dump(mode="json", exclude_defaults=True))
    if isinstance(value, bytes):
        return json.dumps(value.decode())
    return json.dumps(value)


def _type(hint: Any, records: _Records) -> str:
    for known, word in _WORDS:
        if hint == known:
            return word
    if hint in _SIMPLE:
        return _SIMPLE[hint]
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _type(arguments[0], records)
    if origin in (types.UnionType, Union):
        return " or ".join("null" if each is types.NoneType else _type(each, records) for each in arguments)
    if origin is dict:
        return "object" if arguments[1] is Any else f"object of {_type(arguments[1], records)}"
    if origin in (list, tuple, frozenset):
        return f"array of {_type(arguments[0], records)}"
    if origin is typing.Literal:
        return ", ".join(f"`{each}`" for each in arguments)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return ", ".join(f"`{each.value}`" for each in hint)
    if isinstance(hint, type) and issubclass(hint, BaseModel):
        return records.link(hint)
    raise TypeError(f"no words for {hint!r}")


def _comments(record: type[BaseModel]) -> dict[str, str]:
    """What stands above fields, behind "#:"."""
    found: dict[str, str] = {}
    for kind in reversed(record.__mro__):
        if issubclass(kind, BaseModel) and kind is not BaseModel:
            found |= _comments_in(inspect.getsource(kind).splitlines())
    return found


def _comments_in(lines: Iterable[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    above: list[str] = []
    for line in lines:
        if (comment := _COMMENT.match(line)) is not None:
            above.append(comment[1])
            continue
        if above and (field := _FIELD.match(line)) is not None:
            found[field[1]] = " ".join(above).replace("``", "`").replace("|", "\\|")
        above = []
    return {name: re.sub(r":\w+:`([^`]+)`", r"`\1`", text) for name, text in found.items()}


def _docstring(described: type | Callable[..., Any]) -> str:
    text = inspect.getdoc(described)
    assert text, f"{described} has no docstring"
    return " ".join(re.sub(r":\w+:`([^`]+)`", r"`\1`", text).replace("``", "`").split())


def _json(value: Any, indent: int = 3, before: int = 0) -> str:
    """What fits a line is on one, plain values fill lines, everything else is indented.

    :param indent: of the line it begins on, which has ``before`` more characters already.
    """
    line = json.dumps(value)
    if not isinstance(value, dict | list) or indent + before + len(line) < _WIDTH:
        return line
    opening, closing = "{}" if isinstance(value, dict) else "[]"
    inner = indent + 2
    names = [f"{json.dumps(key)}: " for key in value] if isinstance(value, dict) else [""] * len(value)
    values = list(value.values()) if isinstance(value, dict) else value
    parts = [name + _json(each, inner, len(name)) for name, each in zip(names, values, strict=True)]
    lines, filled = [], ""
    for part in parts:
        plain = "\n" not in part
        if filled and plain and inner + len(filled) + len(part) + 2 < _WIDTH:
            filled += f", {part}"
            continue
        lines += [filled] if filled else []
        filled = part if plain else ""
        lines += [] if plain else [part]
    lines += [filled] if filled else []
    space = "\n" + " " * inner
    return opening + space + f",{space}".join(lines) + "\n" + " " * indent + closing


def main() -> None:
    """Write the page."""
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else TARGET
    target.write_text(render())


if __name__ == "__main__":
    main()
