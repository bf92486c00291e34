"""Metrics: what Prometheus' own parser makes of them, and how they are served."""

from __future__ import annotations

import asyncio
import json
import re
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.exposition import generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from hva_host.agent import metrics_server
from hva_host.agent.metrics import FleetCollector, Snapshot
from hva_host.agent.metrics_server import CONNECTIONS_MAX, MetricsServer, look
from hva_host.agent.model import DiskStatus, PolicyStatus, StallBucket, StallStats, VmState, VmStatus
from hva_host.cli.main import main
from hvaqemu.errors import HostError, PeerLost
from hvaqemu.fleet_config import MetricsConfig
from tests.unit.control_stand_ins import MEASURE, epoch, short_folder

_NASTY = 'evil"}\n# TYPE x counter\n\x1b[2J'
_LABELS = {"vm", "residence", "state", "source", "phase", "disk", "files", "le", "version"}
_GRAFANA = Path(__file__).parents[2] / "docs/grafana.json"


def status(name: str = "web", **more: Any) -> VmStatus:
    given: dict[str, Any] = {
        "state": VmState.RUNNING,
        "pid": 1,
        "pager_pid": 2,
        "guest_connected": True,
        "guest_kernel": _NASTY,
        "reason": _NASTY,
        "memory_bytes": 256 << 20,
        "measure": MEASURE.model_copy(update={"zero_refaults": 7, "guest_free_bytes": 4096}),
        "states": {"stable": 3, "unused": 5},
        "epochs": [epoch(1, 100), epoch(2, 50)],
        "stalls": StallStats(
            count=6, sum_s=300.5, buckets=[StallBucket(upper_s=1e-7 * 2**6, count=5), StallBucket(upper_s=1e3, count=1)]
        ),
        "policy": PolicyStatus(
            mode="proactive",
            phase="growing",
            reason=_NASTY,
            working_set_bytes=4096,
            refaults_per_minute=30,
            budget_per_minute=120,
            target_bytes=8192,
        ),
        "disks": [DiskStatus(disk="root", frozen=1, indexed=1, written_bytes=10, frozen_bytes=20, retired_bytes=30)],
    }
    return VmStatus(name=name, **(given | more))


def families(*vms: VmStatus, silent: tuple[str, ...] = ()) -> dict[str, Metric]:
    taken = Snapshot(list(vms), list(silent), 1 << 20, 1.5, 0.01)
    return parse(generate_latest(FleetCollector(taken)))


def parse(text: bytes) -> dict[str, Metric]:
    return {family.name: family for family in text_string_to_metric_families(text.decode())}


def value(found: dict[str, Metric], sample: str, **labels: str) -> float | None:
    """The one sample with these labels, None where there is none."""
    values = [s.value for f in found.values() for s in f.samples if s.name == sample and s.labels == labels]
    assert len(values) <= 1
    return values[0] if values else None


def test_the_official_parser_reads_what_the_records_say() -> None:
    found = families(status(), status("db", measure=None, states={}, epochs=[]), silent=("gone",))
    assert value(found, "hvaqemu_vms") == 3
    assert value(found, "hvaqemu_vm_backing_bytes", vm="web") == 96 << 20
    assert value(found, "hvaqemu_vm_residence_bytes", vm="web", residence="layer") == 512 * 4096
    assert value(found, "hvaqemu_vm_refaults_total", vm="web", source="zero") == 7
    assert value(found, "hvaqemu_vm_state", vm="web", state="running") == 1
    assert value(found, "hvaqemu_vm_state", vm="web", state="held") == 0
    assert value(found, "hvaqemu_vm_guest_bytes", vm="web", state="unused") == 5 * 4096
    assert value(found, "hvaqemu_vm_guest_free_bytes", vm="web") == 4096
    assert value(found, "hvaqemu_vm_last_epoch_discarded_bytes", vm="web") == 50 * 4096
    assert value(found, "hvaqemu_vm_disk_bytes", vm="web", disk="root", files="frozen") == 20
    assert value(found, "hvaqemu_vm_policy_phase", vm="web", phase="growing") == 1
    assert value(found, "hvaqemu_vm_policy_phase", vm="web", phase="idle") == 0
    assert value(found, "hvaqemu_vm_refaults_per_second", vm="web") == 0.5
    assert value(found, "hvaqemu_vm_refaults_allowed_per_second", vm="web") == 2
    assert value(found, "hvaqemu_agent_cpu_seconds_total") == 1.5
    answered = [value(found, "hvaqemu_vm_answered", vm=name) for name in ("web", "db", "gone")]
    assert answered == [1, 0, 0]
    assert value(found, "hvaqemu_vm_backing_bytes", vm="db") is None


def test_names_and_types_follow_prometheus_conventions() -> None:
    units = ("_bytes", "_seconds", "_pages", "_info", "_per_second")
    countless = {"hvaqemu_vms", "hvaqemu_vm_state", "hvaqemu_vm_answered", "hvaqemu_vm_guest_agent_connected",
                 "hvaqemu_vm_reclaim_refused", "hvaqemu_vm_refaults", "hvaqemu_vm_pager_restarts",
                 "hvaqemu_vm_policy_phase"}  # fmt: skip
    for family in families(status()).values():
        assert family.documentation.endswith(".")
        assert re.fullmatch(r"hvaqemu_[a-z_]+", family.name)
        assert family.name.endswith(units) or family.name in countless
        for sample in family.samples:
            assert (family.type == "counter") == sample.name.endswith("_total")
            assert set(sample.labels) <= {
                "vm",
                "residence",
                "state",
                "source",
                "phase",
                "disk",
                "files",
                "le",
                "version",
            }


def test_waits_are_a_cumulative_histogram() -> None:
    found = families(status())
    waits = found["hvaqemu_vm_stall_seconds"]
    assert waits.type == "histogram"
    counts = [s.value for s in waits.samples if s.name.endswith("_bucket")]
    assert counts == sorted(counts)
    bounds = [float(s.labels["le"]) for s in waits.samples if s.name.endswith("_bucket")]
    assert bounds == sorted(set(bounds))
    by_bound = dict(zip(bounds, counts, strict=True))
    assert [by_bound[bound] for bound in (bounds[0], bounds[1], bounds[2], bounds[-2])] == [0, 0, 5, 5]
    assert by_bound[float("inf")] == value(found, "hvaqemu_vm_stall_seconds_count", vm="web") == 6
    assert value(found, "hvaqemu_vm_stall_seconds_sum", vm="web") == 300.5


def test_no_text_of_a_guest_becomes_a_label() -> None:
    found = families(status())
    labels = {text for family in found.values() for sample in family.samples for text in sample.labels.values()}
    assert not any("evil" in text for text in labels)
    assert "x" not in found


def test_the_dashboard_uses_metrics_that_exist() -> None:
    names = {sample.name for family in families(status()).values() for sample in family.samples}
    dashboard = json.loads(_GRAFANA.read_text())
    used = set()
    for panel in dashboard["panels"]:
        assert panel["targets"]
        for target in panel["targets"]:
            metrics = re.findall(r"hvaqemu_\w+", target["expr"])
            assert metrics
            used.update(metrics)
            assert target["expr"].count("(") == target["expr"].count(")")
    for variable in dashboard["templating"]["list"]:
        used.update(re.findall(r"hvaqemu_\w+", json.dumps(variable.get("query", ""))))
    assert used <= names
    places = [panel["gridPos"] for panel in dashboard["panels"]]
    assert all(place["x"] + place["w"] <= 24 for place in places)
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(places)


# Served


class Vm:
    def __init__(self, name: str) -> None:
        self.name = name
        self.asked = 0
        self.answers = asyncio.Event()
        self.answers.set()

    async def status(self) -> VmStatus:
        self.asked += 1
        await self.answers.wait()
        if self.name == "lost":
            raise PeerLost("the pager hung up")
        return status(self.name)


class Fleet:
    def __init__(self, *names: str) -> None:
        self.machines = [Vm(name) for name in names]

    def vms(self) -> list[Vm]:
        return self.machines


@asynccontextmanager
async def serving(fleet: Fleet, where: MetricsConfig) -> AsyncIterator[MetricsServer]:
    server = MetricsServer(fleet)
    await server.start(where)
    try:
        yield server
    finally:
        await server.close()


async def fetch(path: Path, request: bytes = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n") -> tuple[str, bytes]:
    reader, writer = await asyncio.open_unix_connection(path)
    try:
        writer.write(request)
        async with asyncio.timeout(20):
            head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    finally:
        writer.close()
    return head.decode(), body


async def test_they_are_served_on_a_unix_socket_for_its_owner() -> None:
    with short_folder() as folder:
        path = folder / "m.sock"
        async with serving(Fleet("web"), MetricsConfig(listen=f"unix:{path}")):
            assert path.stat().st_mode & 0o777 == 0o600
            head, body = await fetch(path)
            assert head.startswith("HTTP/1.1 200 OK\r\nContent-Type: text/plain; version=0.0.4; charset=utf-8\r\n")
            assert f"Content-Length: {len(body)}" in head
            assert value(parse(body), "hvaqemu_vm_memory_bytes", vm="web") == 256 << 20
            assert (await fetch(path, b"GET / HTTP/1.1\r\n\r\n"))[0].startswith("HTTP/1.1 404 ")
            assert (await fetch(path, b"POST /metrics HTTP/1.1\r\n\r\n"))[0].startswith("HTTP/1.1 405 ")
            assert (await fetch(path, b"HEAD /metrics?a=b HTTP/1.0\r\n\r\n"))[1] == b""
            assert await fetch(path, b"x" * 100_000) == ("", b"")
            assert await fetch(path, b"\r\n\r\n") != ("", b"")
        assert not path.exists()


async def test_they_are_served_on_a_loopback_port() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(HostError, match=r"metrics: 127\.0\.0\.1:\d+: .*in use"):
            await MetricsServer(Fleet()).start(MetricsConfig(listen=f"127.0.0.1:{port}"))
    async with serving(Fleet("web"), MetricsConfig(listen=f"127.0.0.1:{port}")):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /metrics HTTP/1.1\r\n\r\n")
        assert b"hvaqemu_vm_uptime_seconds" in await reader.read()
        writer.close()


async def test_scraping_often_does_not_pile_up_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_server, "_FRESH_SECONDS", 60.0)
    fleet = Fleet("web", "db")
    with short_folder() as folder:
        path = folder / "m.sock"
        async with serving(fleet, MetricsConfig(listen=str(path))) as server:
            fleet.machines[0].answers.clear()
            asking = [asyncio.create_task(fetch(path)) for _ in range(CONNECTIONS_MAX)]
            async with asyncio.timeout(10):
                while len(server._connections) < CONNECTIONS_MAX:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            # One too many is hung up on rather than kept.
            with suppress(ConnectionError):
                assert await fetch(path) == ("", b"")
            fleet.machines[0].answers.set()
            assert all(head.startswith("HTTP/1.1 200") for head, _ in await asyncio.gather(*asking))
            await fetch(path)
            assert [vm.asked for vm in fleet.machines] == [1, 1]
            monkeypatch.setattr(metrics_server, "_FRESH_SECONDS", 0.0)
            await fetch(path)
            assert [vm.asked for vm in fleet.machines] == [2, 2]


async def test_a_client_that_says_nothing_is_hung_up_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_server, "_REQUEST_SECONDS", 0.1)
    with short_folder() as folder:
        path = folder / "m.sock"
        async with serving(Fleet("web"), MetricsConfig(listen=str(path))):
            assert await fetch(path, b"GET /metrics HT") == ("", b"")


async def test_a_vm_that_does_not_answer_keeps_the_others_waiting_for_a_while_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(metrics_server, "_VM_SECONDS", 0.1)
    fleet = Fleet("slow", "web", "lost")
    fleet.machines[0].answers.clear()
    taken = await look(fleet)
    assert [vm.name for vm in taken.vms] == ["web"]
    assert taken.silent == ["slow", "lost"]


async def test_a_socket_left_behind_is_replaced_and_one_in_use_is_not() -> None:
    with short_folder() as folder:
        path = folder / "m.sock"
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(str(path))
        where = MetricsConfig(listen=str(path))
        async with serving(Fleet("web"), where):
            with pytest.raises(HostError, match=r"m\.sock: Address already in use"):
                await MetricsServer(Fleet()).start(where)
            assert (await fetch(path))[0].startswith("HTTP/1.1 200")
        path.write_text("precious")
        with pytest.raises(HostError):
            await MetricsServer(Fleet()).start(where)
        assert path.read_text() == "precious"
        with pytest.raises(HostError, match="File name too long"):
            await MetricsServer(Fleet()).start(MetricsConfig(listen=str(folder / ("m" * 300))))
    with pytest.raises(HostError, match="no such host"):
        await MetricsServer(Fleet()).start(MetricsConfig(listen="a..b:9777", anywhere=True))


async def test_they_move_to_where_the_fleet_file_says(caplog: pytest.LogCaptureFixture) -> None:
    with short_folder() as folder:
        one, two = folder / "one.sock", folder / "two.sock"
        server = MetricsServer(Fleet("web"))

        async def move(where: MetricsConfig | None) -> None:
            server.move(where)
            assert server._moving is not None
            await asyncio.wait({server._moving}, timeout=10)

        await move(None)
        await move(MetricsConfig(listen=str(one)))
        assert (await fetch(one))[0].startswith("HTTP/1.1 200")
        await move(MetricsConfig(listen=str(two)))
        assert not one.exists()
        assert (await fetch(two))[0].startswith("HTTP/1.1 200")
        await move(MetricsConfig(listen=str(folder / "missing/m.sock")))
        assert "missing/m.sock: No such file or directory" in caplog.text
        assert not two.exists()
        await move(MetricsConfig(listen=str(one)))
        assert (await fetch(one))[0].startswith("HTTP/1.1 200")
        await server.close()
        assert not one.exists()


@pytest.mark.parametrize("where", ["0.0.0.0:9777", "[::]:9777", "example.org:80"])
def test_others_are_let_in_only_if_that_is_said(where: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["agent", "--metrics", where]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"hvaqemu: --metrics {where}: must be a loopback address or the path of a unix socket: ")
    assert said.endswith("(unless --metrics-anywhere is set)\n")
    assert said.count("\n") == 1
    assert MetricsConfig(listen=where, anywhere=True).address is not None


@pytest.mark.parametrize("where", ["9777", "127.0.0.1", "127.0.0.1:0", "nowhere", ""])
def test_a_wrong_address_is_one_line(where: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["agent", "--metrics", where, "--metrics-anywhere"]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"hvaqemu: --metrics {where}: ")
    assert said.count("\n") == 1
