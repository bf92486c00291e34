"""How a VM's state is shown, and what its operator can do about it."""

from __future__ import annotations

from collections.abc import Sequence

from rich.text import Text

from hva_host.agent.model import VmState, VmStatus
from hva_host.cli.output import LOUD, cell, progress
from hva_host.cli.text import one_line

_STYLES = {VmState.RUNNING: "green", VmState.PAUSED: "yellow", VmState.STARTING: "cyan", VmState.STOPPING: "cyan"}


def is_loud(state: VmState) -> bool:
    """Whether it takes an operator."""
    return state in (VmState.HELD, VmState.PANICKED, VmState.GONE)


def state_cell(state: VmState) -> Text:
    """The state; in capitals where it takes an operator, because colours do not reach everybody."""
    return cell(state.upper(), LOUD) if is_loud(state) else cell(state, _STYLES[state])


def advice(vm: VmStatus) -> str:
    """What is the matter and what to do, in one line."""
    what = {
        VmState.HELD: f"HELD, bytes of a page can not be trusted, so the guest stands still: {vm.reason}; put that "
        f"right and `hvaqemu resume {vm.name}`, or `hvaqemu down {vm.name}`",
        VmState.PANICKED: f"PANICKED: {vm.reason}; see `hvaqemu console {vm.name}`, then `hvaqemu down {vm.name}`",
        VmState.GONE: f"GONE: {vm.reason}; `hvaqemu down {vm.name}` clears what it left",
    }
    return one_line(what.get(vm.state, vm.reason))


def exit_code(vms: Sequence[VmStatus]) -> int:
    """What a command that shows VMs ends with: 1, and a line on standard error, when a guest stands still for good.

    A VM that is GONE is shown loudly too, but most guests that are gone shut down because they were told to.
    """
    still = [vm for vm in vms if vm.state in (VmState.HELD, VmState.PANICKED)]
    if not still:
        return 0
    progress("hvaqemu: " + "; ".join(f"VM {vm.name}: {advice(vm)}" for vm in still))
    return 1
