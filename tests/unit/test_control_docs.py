"""docs/control.md is what the code does: every command and event is in it, and is as it is described."""

from __future__ import annotations

import ast
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from hva_host.agent.client import ControlClient
from hva_host.agent.control_commands import CommandTable
from hva_host.agent.events import EVENTS, what_is_wrong
from hvaqemu.reclaim_config import ReclaimConfig
from tests.unit.control_stand_ins import Served
from tools import control_docs
from tools.control_examples import COMMANDS, EVENTS_LIKE

_AGENT = Path(__file__).parents[2] / "host-agent/hva_host/agent"
#: What events are handed to, by the last part of its name.
_TELLING = {"tell", "_tell", "_listener", "emit", "_emit", "_on_event", "on_event"}


def test_the_page_is_what_the_code_says() -> None:
    assert control_docs.TARGET.read_text() == control_docs.render(), "`make docs` writes it anew"


def test_every_event_has_an_example() -> None:
    assert EVENTS_LIKE.keys() == EVENTS.keys()
    for name, example in EVENTS_LIKE.items():
        assert type(example) is EVENTS[name]
        assert not what_is_wrong(name, example.model_dump(mode="json"))


@pytest.mark.parametrize(
    ("event", "data", "says"),
    [
        ("NOISE", {}, "is not in"),
        ("FROZEN", {"name": "web", "disk": "root"}, "layer: Field required"),
        ("FROZEN", {"name": "web", "disk": "root", "layer": "l", "size": 1}, "size: Extra inputs"),
        ("VM_STATE", {"name": "web", "state": "asleep", "reason": ""}, "state: Input should be"),
        ("EPOCH", {"name": "web", "stats": {"number": 1}}, "stats.candidates: Field required"),
    ],
)
def test_an_event_that_is_not_as_described_is_found(event: str, data: dict[str, Any], says: str) -> None:
    assert says in what_is_wrong(event, data)


def told() -> Iterator[tuple[str, str, ast.expr]]:
    """Where the host agent tells of an event: the place, the event's name and its data."""
    for path in sorted(_AGENT.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            arguments = node.args
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name == "call_soon_threadsafe":
                name, arguments = getattr(arguments[0], "attr", ""), arguments[1:]
            if name not in _TELLING or len(arguments) != 2:
                continue
            for constant in ast.walk(arguments[0]):
                if isinstance(constant, ast.Constant) and isinstance(constant.value, str) and constant.value.isupper():
                    yield f"{path.name}:{node.lineno}", constant.value, arguments[1]


def test_every_event_that_is_told_is_described_with_its_fields() -> None:
    found = list(told())
    assert len(found) > 20
    for place, event, data in found:
        assert event in EVENTS, place
        if isinstance(data, ast.Dict) and None not in data.keys:
            keys = {key.value for key in data.keys if isinstance(key, ast.Constant)}
            fields = EVENTS[event].model_fields
            # The VM adds its name to what its parts tell.
            assert keys <= fields.keys(), place
            assert {name for name, field in fields.items() if field.is_required()} - keys <= {"name"}, place
    # Those of layer_watch.py go through a variable.
    told_of = {event for _, event, _ in found}
    assert EVENTS.keys() - told_of <= {"LAYER_WRITER", "LAYER_CHANGED", "LAYER_TRUSTED"}


async def test_every_command_returns_what_is_described(control_socket: Served) -> None:
    vm = control_socket.fleet.add("web", allow_exec=True)
    vm.go_on.set()
    hints: dict[str, Any] = {}
    for command in CommandTable(control_socket.fleet, lambda *_: None, lambda: None, lambda: None).all:
        hints[command.name] = typing.get_type_hints(command.run)["return"]
    assert COMMANDS.keys() == hints.keys()
    # In an order in which each can be done.
    last = ["vm-down", "vm-up", "quit"]
    client = await ControlClient.connect(control_socket.path, 10)
    try:
        for name in [*(name for name in COMMANDS if name not in last), *last]:
            returned = await client.execute(name, COMMANDS[name][0])
            if hints[name] is not ReclaimConfig:
                returned = _without_alias(name, returned)
                TypeAdapter(hints[name]).validate_python(returned)
            assert isinstance(COMMANDS[name][1], typing.get_origin(hints[name]) or hints[name])
    finally:
        await client.close()


def _without_alias(name: str, returned: Any) -> Any:
    """``vm-qmp`` returns a key that can not be the name of a field."""
    if name != "vm-qmp":
        return returned
    assert returned.keys() == {"return"}
    return {"returned": returned["return"]}
