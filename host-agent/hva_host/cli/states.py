"""How a VM's state is shown, and what its operator can do about it."""

from __future__ import annotations

from rich.text import Text

from hva_host.agent.model import VmState, VmStatus
from hva_host.cli.output import LOUD, cell
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
        VmState.HELD: f"HELD, a page's bytes can not be trusted, so the guest stands still: {vm.reason}; mend it and "
        f"`hvaqemu resume {vm.name}`, or `hvaqemu down {vm.name}`",
        VmState.PANICKED: f"PANICKED: {vm.reason}; see `hvaqemu console {vm.name}`, then `hvaqemu down {vm.name}`",
        VmState.GONE: f"GONE: {vm.reason}; `hvaqemu down {vm.name}` clears what it left",
    }
    return one_line(what.get(vm.state, vm.reason))
