"""Steps of a scenario that put a load on a service in the guest, and what may be expected of how it was served."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from hvaqemu.bounds import FrequencyBounds, LatencyBounds
from hvaqemu.fields import Config, Frequency, Location, Name, Seconds
from hvaqemu.network_config import NoNetwork, TapNetwork, UserNetwork, service_address

#: Different paths that the ranges of one load may mean.
PATHS_MAX = 10_000
RATE_MAX = 10_000.0

_RANGE = re.compile(r"\[(\d{1,9})-(\d{1,9})\]")
_PATH = re.compile(r"/[!-~]*")


def paths(url: str) -> Iterator[str]:
    """What a path with ranges means: "/page/[1-3]" is three; several ranges are gone through as curl does.

    :raise ValueError: it is no path, or a range is none.
    """
    if _PATH.fullmatch(url) is None:
        raise ValueError(f"{url!r} must be a path in printable ASCII that begins with '/'; the VM is the server")
    parts = _RANGE.split(url)
    ranges = [(int(low), int(high)) for low, high in zip(parts[1::3], parts[2::3], strict=True)]
    count = 1
    for low, high in ranges:
        if high < low:
            raise ValueError(f"[{low}-{high}] counts backwards")
        count *= high - low + 1
        if count > PATHS_MAX:
            raise ValueError(f"means more than {PATHS_MAX:,} paths")
    for numbers in itertools.product(*(range(low, high + 1) for low, high in ranges)):
        yield "".join(part + str(number) for part, number in itertools.zip_longest(parts[0::3], numbers, fillvalue=""))


def _urls(value: object) -> object:
    return (value,) if isinstance(value, str) else value


def _all_paths(value: tuple[str, ...]) -> tuple[str, ...]:
    if not value:
        raise ValueError("name at least one path")
    if sum(1 for url in value for _path in paths(url)) > PATHS_MAX:
        raise ValueError(f"means more than {PATHS_MAX:,} paths")
    return value


class LoadPlan(Config):
    """Requests that are sent at a steady rate beside the steps that follow, until ``load: stop``.

    Each has its own time to be sent, whether those before it are answered or not, and its latency counts from then:
    a server that stands still makes all that come meanwhile late, and not just one.
    """

    #: One path, or several; [1-100] in one is each of these numbers. One is drawn for each request.
    url: Annotated[tuple[str, ...], BeforeValidator(_urls), AfterValidator(_all_paths)]
    rate: Annotated[Frequency, Field(le=RATE_MAX)]
    #: Keep what came of it under this name.
    save: Name
    #: The guest's TCP port.
    port: Annotated[int, Field(strict=True, ge=1, le=65535)] = 80
    #: The longest a request may take.
    timeout: Seconds = 10.0
    #: How long the service may take to answer for the first time.
    ready: Seconds = 60.0


class LoadStep(Config):
    """Begin to send requests."""

    load: LoadPlan


class LoadStopStep(Config):
    """End the load that runs beside the steps."""

    load: Literal["stop"]


class LoadExpectation(Config):
    """What must hold of a load that has ended. Errors are never allowed by saying nothing of them."""

    load: Name
    #: Right answers a second.
    throughput: FrequencyBounds | None = None
    p50: LatencyBounds | None = None
    p99: LatencyBounds | None = None
    p999: LatencyBounds | None = None
    #: So many requests may have failed, or have had a wrong answer.
    errors: Annotated[int, Field(strict=True, ge=0)] = 0

    def bounds(self) -> list[tuple[str, FrequencyBounds | LatencyBounds]]:
        """What is bounded, by the name of its key."""
        found = [(key, getattr(self, key)) for key in ("throughput", "p50", "p99", "p999")]
        return [(key, bounds) for key, bounds in found if bounds is not None]


class LoadExpectStep(Config):
    """Check a load that has ended."""

    expect: LoadExpectation


def complaints(
    steps: Iterable[object], network: NoNetwork | UserNetwork | TapNetwork
) -> Iterator[tuple[Location, str]]:
    """What is wrong with the loads of a scenario's steps, and where."""
    ended: set[str] = set()
    running, began = "", 0
    for index, step in enumerate(steps):
        here: Location = ("steps", index)
        if isinstance(step, LoadStep):
            if running:
                yield (*here, "load"), f"load {running!r} still runs; put `load: stop` before this"
            if step.load.save in ended:
                yield (*here, "load", "save"), f"{step.load.save!r} is saved by an earlier load"
            running, began = step.load.save, index
            try:
                service_address(network, step.load.port)
            except ValueError as error:
                yield (*here, "load"), str(error)
        elif isinstance(step, LoadStopStep):
            if not running:
                yield (*here, "load"), "no load runs here"
            ended.add(running)
            running = ""
        elif isinstance(step, LoadExpectStep):
            if step.expect.load not in ended:
                yield (*here, "expect", "load"), f"no load {step.expect.load!r} has ended before"
            for key, bounds in step.expect.bounds():
                if bounds.of is not None and bounds.of not in ended:
                    yield (*here, "expect", key, "of"), f"no load {bounds.of!r} has ended before"
    if running:
        yield ("steps", began, "load"), "no `load: stop` follows, which is what keeps its result"
