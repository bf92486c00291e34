"""A load on a service: requests at their own times, every byte checked; by the real sender, on real sockets."""

from __future__ import annotations

import asyncio
import base64
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hva_host.load.model import LoadOrder, LoadReport, percentile
from hva_host.load.process import LoadProcess
from hva_host.load.sender import Sender
from hva_host.scenario.player import Player
from hva_host.scenario.progress import Progress
from hvaqemu.errors import ConfigError, DeadlineExceeded, PeerLost
from hvaqemu.load_config import PATHS_MAX, paths
from hvaqemu.scenario_config import Scenario, load_scenario
from hvaqemu.units import format_frequency, parse_frequency
from tests.unit.scenario_stand_ins import Remembering, StandInVm

Serve = Callable[[str], Awaitable[bytes]]
_VM = "vm:\n  name: v\n  memory: 512M\n  network: {type: user, forward: ['8080:80']}\nsteps:\n"
_LOAD = "  - load: {url: /, rate: 50/s, save: a}\n"


def ok(body: bytes, digest: bytes | None = None, more: str = "") -> bytes:
    said = f"Repr-Digest: sha-256=:{base64.b64encode(digest).decode()}:\r\n" if digest is not None else ""
    return f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n{said}{more}\r\n".encode() + body


@asynccontextmanager
async def server(serve: Serve) -> AsyncIterator[tuple[int, list[int]]]:
    """Its port, and how many connections there were."""
    connections = [0]

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections[0] += 1
        try:
            while line := await reader.readline():
                await reader.readuntil(b"\r\n\r\n")
                writer.write(await serve(line.split()[1].decode()))
                await writer.drain()
        except (OSError, EOFError):
            pass
        finally:
            writer.close()

    served = await asyncio.start_server(connected, "127.0.0.1")
    try:
        yield served.sockets[0].getsockname()[1], connections
    finally:
        served.close()


def order(port: int, *asked: str, rate: float = 100.0, timeout: float = 10.0, ready: float = 10.0) -> LoadOrder:
    return LoadOrder(host="127.0.0.1", port=port, paths=list(asked) or ["/"], rate=rate, timeout=timeout, ready=ready)


async def sent(wanted: LoadOrder, seconds: float) -> LoadReport:
    stop = asyncio.Event()
    asyncio.get_running_loop().call_later(seconds, stop.set)
    return await Sender(wanted).run(stop)


async def test_a_steady_rate_over_connections_that_stay() -> None:
    async def serve(path: str) -> bytes:
        return ok(path.encode() * 1000)

    async with server(serve) as (port, connections):
        found = (await sent(order(port, "/a", "/b"), 1.0)).result
    assert 90 <= found.requests <= 101
    assert (found.right, found.failed, found.errors) == (found.requests, 0, {})
    assert found.bytes == 2000 * found.requests
    assert connections[0] < found.requests / 2
    assert 0 < found.p50_s <= found.p99_s <= found.p999_s <= found.longest_s


async def test_a_service_that_stands_still_makes_all_late_that_were_due() -> None:
    """Who waits for an answer before he asks again sees one slow answer, and calls the median good."""
    stands = asyncio.get_running_loop().time() + 1.2

    async def serve(_path: str) -> bytes:
        await asyncio.sleep(stands - asyncio.get_running_loop().time())
        return ok(b"x")

    async with server(serve) as (port, _connections):
        found = (await sent(order(port), 2.0)).result
    assert found.failed == 0
    assert found.p50_s > 0.1
    assert found.longest_s > 1.0


async def test_wrong_bytes_are_found() -> None:
    answers = iter([ok(b"right")] * 3 + [ok(b"wrong")] * 1000)

    async def serve(_path: str) -> bytes:
        return next(answers)

    async with server(serve) as (port, _connections):
        report = await sent(order(port), 0.5)
    assert report.result.right == 3
    assert report.result.errors == {"wrong bytes": report.result.requests - 3}
    assert report.known == {"/": hashlib.sha256(b"right").hexdigest()}


async def test_the_first_answer_may_be_the_wrong_one() -> None:
    async def serve(path: str) -> bytes:
        return ok(b"content", hashlib.sha256(b"content" if path == "/right" else b"other").digest())

    async with server(serve) as (port, _connections):
        right, wrong = [(await sent(order(port, path), 0.3)).result for path in ("/right", "/wrong")]
        known = order(port, "/right").model_copy(update={"known": {"/right": "00"}})
        earlier = (await sent(known, 0.3)).result
    assert right.failed == 0
    assert wrong.right == earlier.right == 0


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (b"HTTP/1.1 500 No\r\nContent-Length: 0\r\n\r\n", "status 500"),
        (b"HTTP/1.1 200 OK\r\n\r\n", "not an answer by HTTP/1.1 with a length"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n", "not an answer by HTTP/1.1 with a length"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n", "not an answer by HTTP/1.1 with a length"),
        (b"220 smtp ready\r\n\r\n", "not an answer by HTTP/1.1 with a length"),
    ],
)
async def test_what_is_no_answer(answer: bytes, error: str) -> None:
    async def serve(_path: str) -> bytes:
        return answer

    async with server(serve) as (port, _connections):
        found = (await sent(order(port, timeout=5.0), 0.3)).result
    assert found.errors == {error: found.requests}
    # A failure is no quick answer.
    assert found.p50_s == 5.0


async def test_an_answer_that_comes_too_late_is_none() -> None:
    async def serve(_path: str) -> bytes:
        await asyncio.sleep(30)
        return ok(b"x")

    async with server(serve) as (port, _connections):
        found = (await sent(order(port, timeout=0.2), 0.3)).result
    assert found.errors == {"no answer in time": found.requests}


async def test_a_process_of_its_own() -> None:
    async def serve(_path: str) -> bytes:
        return ok(b"x")

    async with server(serve) as (port, _connections):
        load = await LoadProcess.start(order(port, ready=30.0))
        await asyncio.sleep(0.5)
        report = await load.stop()
        assert report.result.right == report.result.requests > 0
        # One that dies is told of.
        load = await LoadProcess.start(order(port, ready=30.0))
        load._process.kill()
        with pytest.raises(PeerLost, match="has ended"):
            await load.stop()


async def test_a_service_that_is_not_there(unused_tcp_port: int) -> None:
    with pytest.raises(DeadlineExceeded, match=f"127.0.0.1:{unused_tcp_port} did not answer in 0.3 s: can not"):
        await LoadProcess.start(order(unused_tcp_port, ready=0.3))


def scenario(folder: Path, steps: str) -> Scenario:
    path = folder / "s.yaml"
    path.write_text(_VM + steps)
    return load_scenario(path)


async def test_in_a_scenario(tmp_path: Path) -> None:
    answers = [ok(b"right")]

    async def serve(_path: str) -> bytes:
        return answers[0]

    async with server(serve) as (port, _connections):
        steps = _LOAD + "  - sleep: 500ms\n  - load: stop\n  - load: {url: /, rate: 50/s, save: b, ready: 30s}\n"
        steps += "  - sleep: 500ms\n  - load: stop\n"
        steps += "  - expect: {load: a, throughput: {min: 10/s}, p99: {max: 10s}}\n"
        steps += "  - expect: {load: b, throughput: {of: a, min_ratio: 0.9}}\n"
        played = scenario(tmp_path, steps.replace("8080", str(port)))
        network = played.vm.network.model_copy(update={"forward": (f"127.0.0.1:{port}:80",)})
        played = played.model_copy(update={"vm": played.vm.model_copy(update={"network": network})})
        progress: Progress = Remembering()
        player = Player(StandInVm(tmp_path), played, progress, lambda: 0.0)
        # The second load gets something else than the first one had.
        ending = player._loads.end

        async def end() -> object:
            result = await ending()
            answers[0] = ok(b"wrong")
            return result

        player._loads.end = end  # type: ignore[method-assign,assignment]
        await player.play()
    assert player.loads["a"].failed == 0
    assert player.loads["b"].right == 0
    assert len(player.failures) == 2
    assert player.failures[0].startswith(f"load b: {player.loads['b'].requests} of")
    assert "wrong bytes" in player.failures[0]
    assert player.failures[1] == "load b: throughput 0.0/s is 0.000 of a, less than 0.9"


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        (_LOAD, "steps[0].load: no `load: stop` follows, which is what keeps its result"),
        ("  - load: stop\n", "steps[0].load: no load runs here"),
        (_LOAD + _LOAD + "  - load: stop\n", "steps[1].load: load 'a' still runs; put `load: stop` before this"),
        (2 * (_LOAD + "  - load: stop\n"), "steps[2].load.save: 'a' is saved by an earlier load"),
        ("  - expect: {load: a}\n", "steps[0].expect.load: no load 'a' has ended before"),
        (
            _LOAD + "  - load: stop\n  - expect: {load: a, p99: {of: b, max_ratio: 2}}\n",
            "steps[2].expect.p99.of: no load 'b' has ended before",
        ),
        (
            _LOAD.replace("save: a", "save: a, port: 81") + "  - load: stop\n",
            "steps[0].load: port 81 of the guest is not forwarded; add it to forward in the VM's network",
        ),
        (_LOAD.replace("50/s", "50"), "steps[0].load.rate: write how many a second, for example 50/s"),
        (_LOAD.replace("50/s", "50 s"), "steps[0].load.rate: '50 s' is not a frequency; write for example 50/s"),
        (_LOAD.replace("url: /", "url: a b"), "steps[0].load.url: 'a b' must be a path"),
        (_LOAD.replace("url: /", "url: '/[1-99999]'"), "steps[0].load.url: means more than 10,000 paths"),
        (_LOAD.replace("url: /", "url: '/[2-1]'"), "steps[0].load.url: [2-1] counts backwards"),
        (_LOAD.replace("save: a", "save: a, paths: 1"), "steps[0].load.paths: is not a known key"),
        ("  - load: start\n", "steps[0].load: "),
        (
            _LOAD + "  - load: stop\n  - expect: {load: a, p99: {least: 1s}}\n",
            "steps[2].expect.p99.least: is not a known key",
        ),
        (
            _LOAD + "  - load: stop\n  - expect: {load: a, p99: {max_ratio: 2}}\n",
            "steps[2].expect.p99: a ratio needs `of`, the name of another load",
        ),
        (
            _LOAD + "  - load: stop\n  - expect: {load: a, p99: {}}\n",
            "steps[2].expect.p99: needs max, min, max_ratio or min_ratio",
        ),
    ],
)
def test_what_is_wrong_is_one_line(tmp_path: Path, steps: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        scenario(tmp_path, steps)
    assert f"key {said}" in str(caught.value)


def test_ranges_mean_what_they_mean_to_curl() -> None:
    assert list(paths("/a/[8-10]")) == ["/a/8", "/a/9", "/a/10"]
    assert list(paths("/[1-2]/[0-1].x")) == ["/1/0.x", "/1/1.x", "/2/0.x", "/2/1.x"]
    assert list(paths("/plain?a=[b]")) == ["/plain?a=[b]"]
    assert len(list(paths(f"/[1-{PATHS_MAX}]"))) == PATHS_MAX


@given(st.floats(0.1, 999))
def test_a_frequency_is_read_as_it_is_shown(frequency: float) -> None:
    assert parse_frequency(format_frequency(frequency)) == pytest.approx(frequency, abs=0.051)


@given(st.lists(st.floats(0, 10), min_size=1), st.floats(0.001, 1))
def test_a_percentile_is_a_value_that_so_many_do_not_exceed(values: list[float], share: float) -> None:
    found = percentile(sorted(values), share)
    assert found in values
    assert sum(value <= found for value in values) >= share * len(values) - 1e-6
    assert sum(value < found for value in values) < share * len(values) + 1e-6
