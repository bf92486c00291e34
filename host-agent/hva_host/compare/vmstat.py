"""What a guest's kernel counts of its own memory management (Linux, mm/vmstat.c); asked of the guest's agent."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from hva_host.compare.model import GuestCounters
from hva_host.scenario.seam import PlayedVm

#: Seconds the guest may take.
_ASK_SECONDS = 15.0
#: What the kernel says of each process that it kills, also in a control group (Linux, mm/oom_kill.c).
_KILLED = re.compile(rb"out of memory: Killed process \d+", re.IGNORECASE)
_LINE = re.compile(rb"^([a-z0-9_]{1,64}) (\d{1,18})$", re.MULTILINE)


async def vmstat(vm: PlayedVm) -> dict[str, int]:
    """The guest's /proc/vmstat, as far as it reads like one.

    :raise HvaError: the guest does not answer.
    """
    done = await vm.execute(["/bin/sh", "-c", "cat /proc/vmstat"], timeout=_ASK_SECONDS)
    return {name.decode(): int(value) for name, value in _LINE.findall(done.stdout)}


def counters(found: Mapping[str, int]) -> GuestCounters | None:
    """Those that methods are compared by; None where the guest's kernel does not have all of them."""
    names = {
        "refault_file": "workingset_refault_file",
        "refault_anon": "workingset_refault_anon",
        "major_faults": "pgmajfault",
    }
    if not set(names.values()) <= found.keys():
        return None
    return GuestCounters(**{field: found[name] for field, name in names.items()})


def kills_logged(console_log: Path) -> int:
    """Processes that the guest's kernel killed for want of memory, as far as its console tells. Blocks."""
    with suppress(OSError), console_log.open("rb") as log:
        return sum(_KILLED.search(line) is not None for line in log)
    return 0
