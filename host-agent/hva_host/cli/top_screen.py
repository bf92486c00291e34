"""How ``hvaqemu top`` looks: a table of all VMs in 80 columns, and more about the selected one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from rich.table import Table
from rich.text import Text

from hva_host.agent.event_files import LoggedEvent
from hva_host.agent.model import PolicyStatus, VmState
from hva_host.cli.event_text import describe
from hva_host.cli.output import LOUD, WARN, cell
from hva_host.cli.states import is_loud, state_cell
from hva_host.cli.text import one_line
from hva_host.cli.top_view import Residences, TopView, VmRow
from hvaqemu.units import format_duration, format_size

BAR = 14
KEYS = "up/down select   p pause/continue   r reclaim   o restore   q quit"
_NAME_MAX = 14


class _Part(NamedTuple):
    """A residence: its field, its word, and how it is drawn, also where there is nothing but ASCII."""

    field: str
    word: str
    block: str
    letter: str
    style: str


_PARTS = (
    _Part("resident_bytes", "resident", "\u2588", "#", "green"),
    _Part("preserved_bytes", "in the store", "\u2593", "p", "magenta"),
    _Part("layer_bytes", "in layers", "\u2592", "l", "blue"),
    _Part("zero_bytes", "zeros", "\u2591", "z", "cyan"),
    _Part("untouched_bytes", "untouched", "\u00b7", ".", "dim"),
)


def bar(residences: Residences | None, width: int, ascii_only: bool) -> Text:
    """Guest RAM by residence, ``width`` cells wide; empty where it is not known."""
    made = Text(no_wrap=True)
    if residences is None:
        return made.append("?".ljust(width))
    sizes = [getattr(residences, part.field) for part in _PARTS]
    total, ends, seen = max(1, sum(sizes)), [0], 0
    for size in sizes:
        seen += size
        ends.append(round(width * seen / total))
    for part, start, end in zip(_PARTS, ends, ends[1:], strict=False):
        made.append((part.letter if ascii_only else part.block) * (end - start), style=part.style)
    return made


def listed(view: TopView, selected: str | None, ascii_only: bool) -> Table:
    """All VMs; fits 80 columns."""
    made = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    made.add_column("", width=1)
    made.add_column("NAME", no_wrap=True, width=_NAME_MAX)
    made.add_column("STATE", no_wrap=True, width=8)
    made.add_column("MEMORY", no_wrap=True, width=BAR)
    for title, width in (("BACKING", 10), ("STORE", 10), ("REFAULTS", 9), ("WAITED", 7)):
        made.add_column(title, justify="right", no_wrap=True, width=width)
    for row in view.vms:
        made.add_row(
            ">" if row.name == selected else "",
            _short(row.name),
            state_cell(row.state),
            bar(row.residences, BAR, ascii_only),
            _size(row.backing_bytes),
            _size(row.store_bytes),
            Text(f"{row.rates.refaults:,.0f}/s" if row.rates is not None else "-", WARN if _beyond(row.policy) else ""),
            f"{row.rates.waited_s:.1%}" if row.rates is not None else "-",
        )
    return made


def head(view: TopView) -> Text:
    """What all VMs come to."""
    vms = f"{len(view.vms)} VM{'s' if len(view.vms) != 1 else ''}"
    return _cut(
        Text(
            f"{vms}: given {format_size(view.memory_bytes)}, backing {format_size(view.backing_bytes)}, "
            f"store {format_size(view.store_bytes)}, our own {format_size(view.own_bytes)}"
        )
    )


def legend(ascii_only: bool) -> Text:
    """What the bar's parts mean."""
    made = Text("memory: ", style="dim", no_wrap=True)
    for part in _PARTS:
        made.append((part.letter if ascii_only else part.block) * 2, style=f"not dim {part.style}")
        made.append(f" {part.word}  ")
    return made


def details(row: VmRow) -> list[Text]:
    """All about one VM, a line each."""
    lines = [Text(row.name, style="bold")]
    if row.reason:
        lines.append(cell(f"  {one_line(row.reason)}", LOUD if is_loud(row.state) else WARN))
    if row.reclaim_refused:
        lines.append(cell(f"  not reclaimed: {one_line(row.reclaim_refused)}", WARN))
    if not row.guest_connected and row.state is VmState.RUNNING:
        lines.append(cell("  the agent in the guest is not connected", WARN))
    sizes = ", ".join(f"{name} {format_size(size)}" for name, size in row.guest_bytes.items())
    lines.append(Text(f"  guest's pages: {sizes or 'not scanned yet'}"))
    if row.residences is not None:
        parts = ", ".join(f"{part.word} {format_size(getattr(row.residences, part.field))}" for part in _PARTS)
        lines.append(Text(f"  of {format_size(row.memory_bytes)}: {parts}"))
    if (rates := row.rates) is not None:
        lines.append(
            Text(
                f"  refaults: zeros {rates.zero_refaults:,.0f}/s, layers {rates.layer_refaults:,.0f}/s, store "
                f"{rates.preserved_refaults:,.0f}/s; {format_size(rates.refaulted_bytes)}/s; longest wait "
                f"{format_duration(row.longest_wait_s)}"
            )
        )
    if (policy := row.policy) is not None:
        lines.append(cell(f"  {_policy(policy)}", WARN if _beyond(policy) else ""))
    if (epoch := row.last_epoch) is not None:
        lines.append(cell(f"  last epoch {describe('EPOCH', {'stats': epoch.model_dump()})}"))
    return [_cut(line) for line in lines]


def _policy(policy: PolicyStatus) -> str:
    text = f"policy: mode {policy.mode}, {policy.phase}"
    if policy.refaults_per_minute is not None:
        allowed = f" of {policy.budget_per_minute:,.0f} allowed" if policy.budget_per_minute is not None else ""
        text += f"; {policy.refaults_per_minute:,.0f}{allowed} refaults/min"
    if policy.working_set_bytes is not None:
        text += f"; working set {format_size(policy.working_set_bytes)}"
    if policy.target_bytes is not None:
        text += f"; target {format_size(policy.target_bytes)}"
    return f"{text}; {one_line(policy.reason)}" if policy.reason else text


def _beyond(policy: PolicyStatus | None) -> bool:
    """Does the guest want back more than policy holds it to?"""
    if policy is None or policy.refaults_per_minute is None or policy.budget_per_minute is None:
        return False
    return policy.refaults_per_minute > policy.budget_per_minute


def happened(events: Sequence[LoggedEvent]) -> list[Text]:
    """Events, a line each."""
    lines = [f"  {event.time:%m-%d %H:%M:%SZ} {event.event} {describe(event.event, event.data)}" for event in events]
    return [_cut(cell(one_line(line))) for line in lines]


def attention(view: TopView) -> list[Text]:
    """A line for each VM that needs its operator."""
    loud = [row for row in view.vms if is_loud(row.state)]
    return [cell(f"{row.name}: {row.state.upper()}: {one_line(row.reason)}", LOUD) for row in loud]


def _cut(line: Text) -> Text:
    line.no_wrap, line.overflow = True, "ellipsis"
    return line


def _short(name: str) -> str:
    return name if len(name) <= _NAME_MAX else f"{name[: _NAME_MAX - 1]}~"


def _size(size: int | None) -> str:
    return "?" if size is None else format_size(size)
