"""One look at the host's memory, for policy. Sizes are bytes."""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextlib import suppress

from hva_host.agent import accounts
from hva_host.agent.psi import PRESSURE_FILE
from hva_host.policy.samples import Cgroup, HostSample

_PSI = re.compile(r"^(some|full) avg10=(\d+\.\d+) .*total=(\d+)$", re.MULTILINE)


def look(now: float, pids: Iterable[int]) -> HostSample | None:
    """What the host has; None where it does not say.

    :param now: seconds on the monotonic clock.
    :param pids: processes of which the control groups that hold all count.
    """
    memory = accounts.host_memory()
    if not memory.total:
        return None
    shares, totals = _pressure()
    group = accounts.common_group(pids)
    return HostSample(
        at_s=now,
        total_bytes=memory.total,
        available_bytes=memory.available,
        psi_some=shares.get("some"),
        psi_full=shares.get("full"),
        psi_some_us=totals.get("some"),
        psi_full_us=totals.get("full"),
        cgroup=None if group is None else Cgroup(limit_bytes=group.limit, usage_bytes=group.used),
        swap_total_bytes=memory.swap_total,
        swap_free_bytes=memory.swap_free,
    )


def _pressure() -> tuple[dict[str, float], dict[str, int]]:
    """Shares of time over 10 s, and microseconds since boot, by kind; empty where the kernel does not count them."""
    with suppress(OSError):
        found = _PSI.findall(PRESSURE_FILE.read_text())
        return {kind: float(percent) / 100 for kind, percent, _ in found}, {kind: int(us) for kind, _, us in found}
    return {}, {}
