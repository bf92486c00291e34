"""Looks as JSON lines, so that what was seen on real guests can be decided on again.

The first line names the format; each other one is a look and the time it was decided on::

    {"format": "hvaqemu-policy-trace", "version": 1}
    {"now": 12.5, "look": {"host": {…}, "vms": [{…}]}}

A field that is added later needs a default, and old traces stay good; one that is taken away is passed over in them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Annotated

from pydantic import Field, TypeAdapter, ValidationError

from hva_host.policy.decide import decide
from hva_host.policy.decisions import Decisions
from hva_host.policy.samples import Limits, Look
from hva_host.policy.state import PolicyMemory
from hvaqemu.errors import ConfigError

_HEADER = {"format": "hvaqemu-policy-trace", "version": 1}


@dataclass(frozen=True, slots=True)
class Recorded:
    """One line."""

    now: Annotated[float, Field(allow_inf_nan=False)]
    look: Look


_ADAPTER = TypeAdapter(Recorded)


def header() -> str:
    """The first line, without its end."""
    return json.dumps(_HEADER)


def dump(now: float, look: Look) -> str:
    """One line, without its end."""
    return _ADAPTER.dump_json(Recorded(now, look)).decode()


def load(lines: Iterable[str], source: str) -> Iterator[Recorded]:
    """The looks of a trace, in order.

    :param source: the name that errors give it.
    :raise ConfigError: naming the line that is not one.
    """
    for number, line in enumerate(lines, 1):
        try:
            if number == 1:
                if json.loads(line) != _HEADER:
                    raise ConfigError(f"{source}:1: is not a trace of version {_HEADER['version']}")
                continue
            yield _ADAPTER.validate_json(line)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = "".join(f"{step}." for step in first["loc"])[:-1]
            raise ConfigError(f"{source}:{number}: {where or 'look'}: {first['msg']}") from error
        except ValueError as error:
            raise ConfigError(f"{source}:{number}: is not JSON") from error


def replay(looks: Iterable[Recorded], limits: Limits) -> Iterator[tuple[Recorded, Decisions]]:
    """What is decided on each look of a trace.

    What the decisions would have changed is not in later looks; a step is seen to end where one did in the trace.
    """
    memory = PolicyMemory()
    for each in looks:
        # Those who were busy were so with what was decided then.
        look = replace(each.look, vms=tuple(replace(vm, busy=None) for vm in each.look.vms))
        memory, decisions = decide(memory, look, limits, each.now)
        yield each, decisions
