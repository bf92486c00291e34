"""``hvaqemu ls``: all VMs."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from hva_host.cli.arguments import Subparsers, add_command, add_json

if TYPE_CHECKING:
    from rich.console import RenderableType

    from hva_host.agent.model import NetworkStatus, VmStatus

_DESCRIPTION = """\
List the VMs that `hvaqemu up` started, with what each occupies on the host (backing) of the memory
it was given. A VM that needs you is shown loudly, with the reason below the list, and so is one whose
memory can not be reclaimed now. Exit code 1 if a VM is HELD or PANICKED.
"""


def add_parser(subparsers: Subparsers) -> None:
    parser = add_command(subparsers, "ls", "list the VMs", _DESCRIPTION, "hvaqemu ls\nhvaqemu ls --json")
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    from hva_host.cli.output import print_json, show
    from hva_host.cli.session import with_agent
    from hva_host.cli.states import exit_code

    vms = with_agent(lambda client: client.vms())
    if options.json:
        print_json([vm.model_dump(mode="json") for vm in vms])
    elif vms:
        show(*render(vms))
    else:
        print("no VM is running; start one with: hvaqemu up VM.yaml")
    return exit_code(vms)


def render(vms: list[VmStatus]) -> list[RenderableType]:
    """The list, and below it a line for each VM that needs its operator, or that nothing is discarded of."""
    from hva_host.cli.output import LOUD, WARN, cell, table
    from hva_host.cli.states import advice, is_loud, state_cell
    from hva_host.cli.text import one_line
    from hvaqemu.pages import PAGE_SIZE
    from hvaqemu.units import format_duration, format_size

    figures = ("#PROCESS", "#MEMORY", "#BACKING", "#STORE", "#DISCARDED", "#REFAULTS", "#UP")
    listed = table("NAME", "STATE", *figures, "GUEST AGENT", "ADDRESS")
    for vm in vms:
        measure = vm.measure
        gone = (measure.zero_pages + measure.layer_pages + measure.preserved_pages) if measure else 0
        listed.add_row(
            cell(vm.name),
            state_cell(vm.state),
            str(vm.pid),
            format_size(vm.memory_bytes),
            format_size(measure.backing_bytes) if measure else "?",
            format_size(measure.store_bytes) if measure else "?",
            format_size(gone * PAGE_SIZE) if measure else "?",
            f"{measure.refaults:,}" if measure else "?",
            format_duration(measure.uptime_s) if measure else "?",
            "connected" if vm.guest_connected else "not connected",
            cell(_reached(vm.network)),
        )
    lines = [cell(f"{vm.name}: {advice(vm)}", LOUD) for vm in vms if is_loud(vm.state)]
    lines += [
        cell(f"{vm.name}: not reclaimed: {one_line(vm.reclaim_refused)}", WARN) for vm in vms if vm.reclaim_refused
    ]
    return [listed, *lines]


def _reached(network: NetworkStatus | None) -> str:
    """Where the host finds the guest; "-": nowhere, or not known."""
    if network is None or network.type == "none":
        return "-"
    # Behind a user network the guest's own address means nothing to the host.
    return " ".join(network.forward) or "-" if network.type == "user" else network.address or "-"
