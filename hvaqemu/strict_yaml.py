"""Strict YAML: a file becomes a pydantic model, or one line says which file, line and key is wrong.

Only plain data is accepted: no tags, each key once, keys are text. Words that YAML 1.1 reads as truth values or as
numbers by surprise (``off``, ``yes``, ``on``, ``no``, ``1:30``, ``2020-01-01``) stay text, as in the core schema of
YAML 1.2. The size of a document and what its aliases expand to are bounded.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from hvaqemu.errors import ConfigError

M = TypeVar("M", bound=BaseModel)

#: Bytes of a file; far beyond what a person writes.
SIZE_MAX = 1 << 20
#: Values in a document once its aliases are expanded.
VALUES_MAX = 20_000
#: Levels of nesting.
DEPTH_MAX = 50

Location = tuple[str | int, ...]

_PLAIN = "tag:yaml.org,2002:"
_UNQUOTED = "tag:hvaqemu,unquoted"
_NULL = {"", "~", "null", "Null", "NULL"}
_BOOL = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_INT = re.compile(r"[-+]?[0-9]+|0x[0-9a-fA-F]+|0o[0-7]+")
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?")


def load(path: Path, model: type[M], context: object = None) -> M:
    """The file at ``path`` as a ``model``.

    :param context: for the model's validators.
    :raise ConfigError: it can not be read, is not YAML, or is not what ``model`` asks for.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(SIZE_MAX + 1)
        text = raw.decode()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}:{line}: is not UTF-8 text") from error
    return loads(text, str(path), model, context)


def loads(text: str, source: str, model: type[M], context: object = None) -> M:
    """``text`` as a ``model``; ``source`` is the name that errors give it.

    :param context: for the model's validators.
    :raise ConfigError: it is not YAML, or is not what ``model`` asks for.
    """
    if len(text) > SIZE_MAX:
        raise ConfigError(f"{source}: is longer than {SIZE_MAX} characters")
    reader = _Reader(source)
    data = reader.read(text)
    if data is None:
        data = {}
    if not isinstance(data, dict):
        raise ConfigError(f"{source}:1: must hold keys and values, not {_kind(data)}")
    try:
        return model.model_validate(data, context=context)
    except ValidationError as error:
        raise ConfigError(reader.explain(error)) from error


def value(text: str, source: str) -> Any:
    """``text`` as one plain value, by the rules for files: a text, number, truth value, list or mapping.

    :raise ConfigError: it is not YAML; ``source`` is the name that the error gives it.
    """
    if len(text) > SIZE_MAX:
        raise ConfigError(f"{source}: is longer than {SIZE_MAX} characters")
    return _Reader(source).read(text)


def explain(error: ValidationError, below: str) -> str:
    """The first of pydantic's complaints about values from no file, and how many more there are, as one line.

    :param below: the key whose value they are.
    """
    first, more = _first(error)
    return f"{_key((below, *first['loc']))}{_what(first)}{more}"


class _Loader(yaml.SafeLoader):
    """Marks unquoted scalars with a tag of their own, so that PyYAML's YAML 1.1 guesses at their type never count."""

    yaml_implicit_resolvers = {None: [(_UNQUOTED, re.compile(""))]}


class _Reader:
    """Builds plain values from YAML nodes and remembers the line of each."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._lines: dict[Location, int] = {}
        self._values = 0

    def read(self, text: str) -> Any:
        try:
            loader = _Loader(text)
            try:
                node = loader.get_single_node()
            finally:
                loader.dispose()
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            line = mark.line + 1 if mark else 1
            raise ConfigError(f"{self._source}:{line}: {error.problem or error.context}") from error
        except yaml.reader.ReaderError as error:
            line = text.count("\n", 0, error.position) + 1
            raise ConfigError(f"{self._source}:{line}: holds a character that YAML does not allow") from error
        except RecursionError as error:
            raise ConfigError(f"{self._source}: nested deeper than {DEPTH_MAX} levels") from error
        return None if node is None else self._value(node, ())

    def _fail(self, line: int, where: Location, what: str) -> ConfigError:
        key = f" key {_dotted(where)}:" if where else ""
        return ConfigError(f"{self._source}:{line}:{key} {what}")

    def _check_tag(self, node: yaml.Node, where: Location, kind: str) -> None:
        if node.tag != _PLAIN + kind:
            raise self._fail(node.start_mark.line + 1, where, "tags (!name) are not allowed")

    def _value(self, node: yaml.Node, where: Location) -> Any:
        line = node.start_mark.line + 1
        self._lines.setdefault(where, line)
        self._values += 1
        if self._values > VALUES_MAX:
            raise self._fail(line, where, f"more than {VALUES_MAX} values, aliases expanded")
        if len(where) > DEPTH_MAX:
            raise self._fail(line, where[:3], f"nested deeper than {DEPTH_MAX} levels")
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, where)
        if isinstance(node, yaml.SequenceNode):
            self._check_tag(node, where, "seq")
            return [self._value(item, (*where, index)) for index, item in enumerate(node.value)]
        if node.tag == _UNQUOTED:
            return _unquoted(node.value)
        self._check_tag(node, where, "str")
        return node.value

    def _mapping(self, node: yaml.MappingNode, where: Location) -> dict[str, Any]:
        result: dict[str, Any] = {}
        self._check_tag(node, where, "map")
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise self._fail(line, where, "a key must be text")
            key = key_node.value
            here = (*where, key)
            if key in result:
                raise self._fail(line, here, f"appears twice, first on line {self._lines[here]}")
            self._lines[here] = line
            result[key] = self._value(value_node, here)
        return result

    def explain(self, error: ValidationError) -> str:
        """The first of pydantic's complaints, and how many more there are, as one line."""
        first, more = _first(error)
        where, line = self._place(first["loc"])
        missing = first["type"] == "missing"
        shown = where if not missing else (*where, *first["loc"][-1:])
        return f"{self._source}:{line}: {_key(shown)}{_what(first)}{more}"

    def _place(self, loc: Location) -> tuple[Location, int]:
        """The deepest place in the file that ``loc`` names, and its line.

        pydantic adds steps of its own to ``loc`` (names of union members, "[key]"); what leads nowhere is left out.
        """
        where: Location = ()
        for step in loc:
            if (*where, step) in self._lines:
                where = (*where, step)
        return where, self._lines.get(where, 1)


def _first(error: ValidationError) -> tuple[Mapping[str, Any], str]:
    """The complaint to show, and in words how many more there are."""
    complaints = error.errors(include_url=False)
    # An unknown key is usually the typing error behind a "missing" one, so it is the better first line.
    first = next((each for each in complaints if each["type"] == "extra_forbidden"), complaints[0])
    return first, f" (and {len(complaints) - 1} more)" if len(complaints) > 1 else ""


def _key(where: Location) -> str:
    return f"key {_dotted(where)}: " if where else ""


def _what(complaint: Mapping[str, Any]) -> str:
    kind = complaint["type"]
    if kind == "extra_forbidden":
        return "is not a known key"
    if kind == "missing":
        return "is missing"
    if kind == "model_type":
        return f"should have keys of its own, not be {_kind(complaint.get('input'))}"
    message = " ".join(str(complaint["msg"]).split())
    if kind == "value_error":
        return message.removeprefix("Value error, ")
    given = complaint.get("input")
    suffix = (
        f", not {_kind(given)}" if given is None or isinstance(given, str | int | float | bool | list | dict) else ""
    )
    return f"{message[:1].lower()}{message[1:]}{suffix}"


def _kind(value: object) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, dict):
        return "keys and values"
    if isinstance(value, list):
        return "a list"
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."


def _dotted(where: Location) -> str:
    text = ""
    for step in where:
        text += f"[{step}]" if isinstance(step, int) else (f".{step}" if text else step)
    # Keys come from a file and are shown on a terminal.
    return "".join(letter if letter.isprintable() else "?" for letter in text[:200])


def _unquoted(value: str) -> Any:
    if value in _NULL:
        return None
    if value in _BOOL:
        return _BOOL[value]
    if _INT.fullmatch(value) and len(value) <= 40:
        return int(value, 0) if value[:2] in ("0x", "0o") else int(value)
    if _FLOAT.fullmatch(value) and math.isfinite(float(value)):
        return float(value)
    return value
