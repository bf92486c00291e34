"""Guests are added one by one until one fails, or until all together answer less than 0.9 of what as many guests do
that have no limit.

HVABENCH_DENSITY_MIB is the limit. Takes the better part of an hour; what is found is written after every guest, so that
HVABENCH_DENSITY_METHODS (``balloon,hva``) may name those to try again: of the others the last run's is shown.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict
from typing import Any

from benchmarks.density import picture
from benchmarks.density.group import Group, limited
from benchmarks.density.model import FIRST_PORT, Fit, Found
from benchmarks.density.visitors import Visitors, Window
from benchmarks.figure import FOLDER, Figure, show
from hva_host.compare.method import Method
from hvaqemu.errors import HostError, HvaError
from hvaqemu.paths import cache_dir
from hvaqemu.units import MiB

#: Requests a second of each guest. Two cores emulate all of them, and a guest that does nothing takes 0.06 of one: its
#: kernel ticks 250 times a second (Debian's has CONFIG_HZ_PERIODIC on s390x).
RATE = 0.1
#: Of what as many guests without the limit answer.
ENOUGH = 0.9
#: A guest that answers less than this has failed, however many others there are.
_SERVES = 0.5
_METHODS = (Method.NONE, Method.BALLOON, Method.HVA)
_MOST = 80
#: Seconds that all are looked at; and, where that is not enough, once more: after what is held has come to rest, that
#: is changes by less than this share in ten seconds, or has been waited for so long.
_LOOK_SECONDS, _LONG_SECONDS = 20.0, 60.0
_STILL_SHARE, _STILL_SECONDS, _SETTLE_SECONDS = 0.01, 10.0, 120.0
#: A guest that is not up and has not read its files after five times as long as one takes alone does not fit.
_UP_SECONDS, _ASK_SECONDS, _END_SECONDS = 300.0, 120.0, 120.0
_RESULT = FOLDER / "density-guests.json"


def main() -> None:
    """Try each method."""
    # As Ctrl-C, which a shell has its background ignore: what was started ends, and the group goes.
    for ending in (signal.SIGINT, signal.SIGTERM):
        signal.signal(ending, signal.default_int_handler)
    try:
        limit = int(os.environ.get("HVABENCH_DENSITY_MIB", "1536")) * MiB
        found = asyncio.run(_measure(limit))
    except (HvaError, ValueError) as error:
        sys.exit(f"density: {error}")
    none, balloon = found[Method.NONE].guests, found[Method.BALLOON].guests
    figures = []
    for method, each in found.items():
        reach = f">= {max(4 * none, 2 * balloon)}" if method is Method.HVA else ""
        what = f"guests of 512 MiB that serve in {limit // MiB} MiB, method {method}"
        figures.append(Figure(what, each.guests, reach, "", f"{each.ended}; {_memory(each)}"))
    picture.draw(found.values(), limit)
    show("density", figures)


async def _measure(limit: int) -> dict[Method, Found]:
    found = {method: Found.of(each) for method, each in _known().items() if method in _METHODS}
    wanted = [Method(name) for name in os.environ.get("HVABENCH_DENSITY_METHODS", ",".join(_METHODS)).split(",")]
    if missing := set(_METHODS) - {*found, *wanted}:
        raise HostError(f"nothing is known of method {', '.join(sorted(missing))}", "name it too")
    for method in wanted:
        found[method] = Found(method)
        await _fit(found[method], method, limit)
    most = max(each.guests for each in found.values())
    free = await _reference(most)
    print(f"without the limit {most} answer {free.share:.3f} of all requests", flush=True)
    return found


async def _fit(found: Found, method: Method, limit: int) -> None:
    _forget_files()
    async with _host(method, limit, fill=True) as (group, host), _visitors() as visitors:
        while found.guests < _MOST and not found.ended:
            number = found.guests
            answer = await _ask(host, {"up": number}, _UP_SECONDS)
            if "error" in answer:
                found.ended = _why(group, f"guest {number + 1} does not start: {answer['error']}")
                print(f"{found.method}: {found.ended}", flush=True)
                _keep({method: found})
                break
            visitors.begin("127.0.0.1", FIRST_PORT + number)
            used, began = group.cpu_seconds(), time.monotonic()
            window = await visitors.watch(_LOOK_SECONDS)
            if _short(window):
                # What the last guest's start disturbed is not what as many can not do.
                await _rested(group)
                window = await visitors.watch(_LONG_SECONDS)
            look = await _ask(host, {"look": True}, _ASK_SECONDS)
            guests = look.get("guests", [])
            gone = [f"{guest['name']}: {guest['gone']}" for guest in guests if "gone" in guest]
            if gone or len(guests) != number + 1 or "error" in look:
                found.ended = _why(group, f"with {number + 1} {'; '.join(gone) or look.get('error', 'some are gone')}")
            elif _short(window):
                why = f"with {number + 1} {window.share:.2f} is answered, of one guest {window.worst:.2f}"
                found.ended = _why(group, f"{why} ({', '.join(window.errors)})")
            else:
                cpu = (group.cpu_seconds() - used) / (time.monotonic() - began)
                found.fits.append(Fit(number + 1, window.share, window.worst, cpu, group.usage(), guests))
            _say(found, group, window)
            _keep({method: found})


async def _reference(guests: int) -> Window:
    """What as many guests answer that may have all memory they want."""
    async with _host(Method.NONE, None, fill=False) as (_group, host), _visitors() as visitors:
        for number in range(guests):
            answer = await _ask(host, {"up": number}, _UP_SECONDS)
            if "error" in answer:
                raise HostError(f"without a limit, guest {number + 1} of {guests} does not start: {answer['error']}")
            visitors.begin("127.0.0.1", FIRST_PORT + number)
        return await visitors.watch(_LONG_SECONDS)


def _short(window: Window) -> bool:
    return window.share < ENOUGH or window.worst < _SERVES


def _why(group: Group, what: str) -> str:
    """With what the group says to it: an end for another reason than its limit is none that counts."""
    kills = group.usage().kills
    return f"{what}; killed for want of memory: {kills}"


async def _rested(group: Group) -> None:
    """Wait until what is held changes little."""
    deadline = time.monotonic() + _SETTLE_SECONDS
    before, now = 0, group.usage().held
    while abs(now - before) > _STILL_SHARE * before and time.monotonic() < deadline:
        await asyncio.sleep(_STILL_SECONDS)
        before, now = now, group.usage().held


def _forget_files() -> None:
    """Have the host forget the images' content, which counts for the group that reads it first."""
    for path in (cache_dir() / "images").rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _say(found: Found, group: Group, window: Window) -> None:
    held = group.usage().held / MiB
    last = found.ended or f"{found.guests} serve"
    print(f"{found.method}: {last}; {window.share:.3f} answered, {held:.0f} MiB held", flush=True)


def _memory(found: Found) -> str:
    """MiB a guest, in the mean, of as many as fit."""
    if not found.fits:
        return ""
    last = found.fits[-1]
    keys = ("backing_bytes", "store_bytes", "qemu_own_bytes", "pager_pss_bytes")
    means = {key: sum(each[key] for each in last.measures) / last.guests / MiB for key in keys}
    parts = ", ".join(f"{key.removesuffix('_bytes').replace('_', ' ')} {mean:.1f}" for key, mean in means.items())
    usage = last.usage
    whole = ", ".join(
        f"{what} {size / MiB:.0f}"
        for what, size in (
            ("shared", usage.shared),
            ("anonymous", usage.anonymous),
            ("kernel", usage.kernel),
            ("files", usage.files),
        )
    )
    layers = last.measures[0]["layer_cached_bytes"] / MiB
    return f"MiB a guest: {parts}; the group: {whole} (layers {layers:.0f}); {last.cpu:.2f} cores"


def _keep(found: dict[Method, Found]) -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    _RESULT.write_text(json.dumps(_known() | {method: asdict(each) for method, each in found.items()}, indent=1))


def _known() -> dict[Method, dict[str, Any]]:
    """What was found last."""
    found = json.loads(_RESULT.read_text()) if _RESULT.exists() else {}
    return {Method(method): each for method, each in found.items()}


@asynccontextmanager
async def _visitors() -> AsyncIterator[Visitors]:
    visitors = Visitors(RATE)
    try:
        yield visitors
    finally:
        await visitors.end()


@asynccontextmanager
async def _host(
    method: Method, limit: int | None, *, fill: bool
) -> AsyncIterator[tuple[Group, asyncio.subprocess.Process]]:
    with limited(limit) as group:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "benchmarks.density.host", method, "fill" if fill else ""),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            preexec_fn=group.join,
            # A Ctrl-C is for us; it ends with its standard input.
            start_new_session=True,
            limit=1 << 22,
        )
        try:
            yield group, process
        finally:
            assert process.stdin is not None
            process.stdin.close()
            with suppress(TimeoutError):
                async with asyncio.timeout(_END_SECONDS):
                    await process.wait()


async def _ask(host: asyncio.subprocess.Process, order: dict[str, Any], seconds: float) -> dict[str, Any]:
    assert host.stdin is not None
    assert host.stdout is not None
    try:
        host.stdin.write(json.dumps(order).encode() + b"\n")
        async with asyncio.timeout(seconds):
            line = await host.stdout.readline()
    except TimeoutError:
        return {"error": f"the host's process does not answer within {seconds:g} s"}
    except OSError as error:
        return {"error": f"the host's process: {error.strerror}"}
    return dict(json.loads(line)) if line else {"error": "the host's process was killed"}
