"""``hvaqemu status``: all about one VM."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from hva_host.cli.arguments import Subparsers, add_command, add_json, add_name

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from hva_host.agent.model import DiskStatus, EpochStats, Measure, NetworkStatus, PolicyStatus, VmStatus

_EPOCHS_SHOWN = 8
#: Policy that waits for less goes on at the pace of its own looks.
_WAITS_SECONDS = 10.0
_DESCRIPTION = """\
Show one VM: its memory on the host and what giving it back costs, what the last epochs did, and how
long the guest's processors waited for pages to come back. Exit code 1 if it is HELD or PANICKED.
"""


def add_parser(subparsers: Subparsers) -> None:
    examples = "hvaqemu status quickstart\nhvaqemu status quickstart --json"
    parser = add_command(subparsers, "status", "show one VM", _DESCRIPTION, examples)
    add_name(parser)
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    from hva_host.cli.output import print_json, show
    from hva_host.cli.session import with_agent
    from hva_host.cli.states import exit_code

    vm = with_agent(lambda client: client.status(options.name))
    if options.json:
        print_json(vm.model_dump(mode="json"))
    else:
        show(*render(vm))
    return exit_code([vm])


def render(vm: VmStatus) -> list[RenderableType]:
    """The VM, its memory, its epochs; first what needs its operator."""
    from hva_host.cli.output import LOUD, WARN, cell, pairs
    from hva_host.cli.states import advice, is_loud, state_cell
    from hvaqemu.units import format_duration, format_size

    state = state_cell(vm.state)
    if vm.reason and not is_loud(vm.state):
        state.append(f" ({cell(vm.reason).plain})", style="default not bold")
    rows: list[tuple[str, object]] = [("name", vm.name), ("state", state)]
    if vm.reclaim_refused:
        rows.append(("not reclaimed", cell(vm.reclaim_refused, WARN)))
    agent = f"connected: {vm.guest_kernel}" if vm.guest_connected else "not connected"
    restarts = f", restarted {vm.pager_restarts} times, longest pause {format_duration(vm.pager_pause_s)}"
    rows += [
        ("processes", f"QEMU {vm.pid}, pager {vm.pager_pid}{restarts if vm.pager_restarts else ''}"),
        ("guest agent", agent),
        ("memory", format_size(vm.memory_bytes)),
        *(_memory(vm.measure) if vm.measure else [("measure", "no answer from the pager")]),
    ]
    if vm.policy is not None:
        rows.append(("reclaim", _policy(vm.policy)))
    rows += [(f"disk {disk.disk}", _disk(disk)) for disk in vm.disks]
    rows += [("network", _network(vm.network))] if vm.network is not None else []
    stalls = vm.stalls
    if stalls.count:
        waited = ", ".join(
            f"{name} {format_duration(seconds)}"
            for name, seconds in (
                ("sum", stalls.sum_s),
                ("median", stalls.median_s),
                ("p99", stalls.p99_s),
                ("longest", stalls.longest_s),
            )
        )
        rows.append(("vCPUs waited", f"{stalls.count:,} times: {waited}"))
    parts: list[RenderableType] = [cell(advice(vm), LOUD)] if is_loud(vm.state) else []
    parts.append(pairs(rows))
    for held in vm.held:
        pages = ", ".join(map(str, held.pages))
        parts.append(cell(f"held: {held.layer}: {held.reason}; pages {pages}", LOUD))
    if vm.epochs:
        parts += ["", _epochs(vm.epochs)]
    return parts


def _policy(policy: PolicyStatus) -> str:
    from hvaqemu.units import format_duration, format_size

    parts = [policy.mode if policy.target_bytes is None else f"{policy.mode} {format_size(policy.target_bytes)}"]
    if policy.phase != "idle":
        parts.append(f"{policy.phase} ({policy.reason})" if policy.reason else policy.phase)
    if policy.again_s is not None and policy.again_s >= _WAITS_SECONDS:
        parts.append(f"goes on in {format_duration(policy.again_s)}")
    if policy.working_set_bytes is not None:
        parts.append(f"working set {format_size(policy.working_set_bytes)}")
    if policy.refaults_per_minute is not None:
        budget = "" if policy.budget_per_minute is None else f", budget {policy.budget_per_minute:.0f}"
        parts.append(f"{policy.refaults_per_minute:.0f} refaults a minute{budget}")
    return "; ".join(parts)


def _network(network: NetworkStatus) -> str:
    if network.type == "none":
        return "none"
    parts = [network.type, network.address or "an address by DHCP", f"mac {network.mac}"]
    parts += [f"forwarded {', '.join(network.forward)}"] if network.forward else []
    places = ("bridge", "namespace", "device")
    parts += [f"{place} {name}" for place in places if (name := getattr(network, place))]
    return ", ".join(parts)


def _disk(disk: DiskStatus) -> str:
    from hvaqemu.units import format_size

    frozen = f"{disk.frozen} frozen, {format_size(disk.frozen_bytes)}"
    frozen += f" ({disk.indexed} in use)" if disk.indexed < disk.frozen else ""
    merged = f", {format_size(disk.retired_bytes)} merged and still needed" if disk.retired_bytes else ""
    return f"{format_size(disk.written_bytes)} written; {frozen}{merged}"


def _memory(measure: Measure) -> list[tuple[str, object]]:
    from hvaqemu.pages import PAGE_SIZE
    from hvaqemu.units import format_duration, format_size

    def pages(count: int) -> str:
        return format_size(count * PAGE_SIZE)

    free = format_size(measure.guest_free_bytes) if measure.guest_free_bytes >= 0 else "unknown"
    return [
        ("up", format_duration(measure.uptime_s)),
        ("backing", format_size(measure.backing_bytes)),
        (
            "discarded",
            f"{pages(measure.zero_pages)} come back as zeros, {pages(measure.layer_pages)} from layers, "
            f"{pages(measure.preserved_pages)} from the store",
        ),
        ("refaults", f"{measure.refaults:,} brought {pages(measure.refault_pages)} back"),
        (
            "own memory",
            f"QEMU {format_size(measure.qemu_rss_bytes)}, pager {format_size(measure.pager_pss_bytes)}, "
            f"host agent {format_size(measure.agent_rss_bytes)}, {_store(measure)}",
        ),
        ("layers cached", f"{format_size(measure.layer_cached_bytes)} in the host's page cache"),
        ("guest's free", free),
    ]


def _store(measure: Measure) -> str:
    from hvaqemu.units import format_size

    size, cached = format_size(measure.store_bytes), measure.store_cached_bytes
    if cached is None:
        return f"store {size}"
    return f"store {size} on disk, {format_size(cached)} of it in the page cache"


def _epochs(epochs: list[EpochStats]) -> Table:
    from hva_host.cli.output import cell, table
    from hvaqemu.units import format_duration

    phases = ["scan", "protect", "prove", "confirm", "discard", "total"]
    names = ["candidates", "proven", "touched", "unmatched", "unconfirmed", "discarded"]
    if any(epoch.discarded_store or epoch.unpreserved for epoch in epochs[-_EPOCHS_SHOWN:]):
        phases.insert(3, "preserve")
        names[-1:] = ["unpreserved", "resting", "discarded"]
    if any(epoch.seconds.paused for epoch in epochs[-_EPOCHS_SHOWN:]):
        phases.insert(-1, "paused")
    made = table(
        "#EPOCH",
        *(f"#{name}" for name in names),
        *(f"#{phase}" for phase in phases),
        "#slices",
        "#protected",
        "note",
    )
    for epoch in epochs[-_EPOCHS_SHOWN:]:
        made.add_row(
            str(epoch.number),
            *(f"{getattr(epoch, name):,}" for name in names),
            *(format_duration(getattr(epoch.seconds, phase)) for phase in phases),
            str(epoch.slices),
            format_duration(epoch.protected_s),
            cell(epoch.note),
        )
    return made
