"""What policy sees: one look at each VM and one at the host.

Times named ``at_s`` and ``now`` are seconds of one clock that only goes forward (CLOCK_MONOTONIC), ages are seconds
before the look's own ``at_s``. Counters are cumulative since the VM's pager started; one that is smaller than in the
look before began anew, and that look gives no rates. Shares are 0 to 1. What could not be found out is None: nothing is
decided on it.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from hvaqemu.reclaim_config import ReclaimConfig


class Condition(enum.StrEnum):
    """What keeps a VM from being reclaimed from, if anything."""

    RUNNING = "running"
    #: Stopped by somebody: its memory may be reclaimed, but it can not be asked, and its quiet says nothing.
    PAUSED = "paused"
    #: A fault must not be answered.
    HELD = "held"
    #: Starting, panicked, stopping, or its pager is being replaced.
    AWAY = "away"


@dataclass(frozen=True, slots=True)
class Refaults:
    """Fault events that somebody waited for, by where the bytes came from. Cumulative.

    Pages that fault-around brought beside them are not counted: nobody asked for those.
    """

    zero: int = 0
    layer: int = 0
    store: int = 0

    @property
    def all(self) -> int:
        return self.zero + self.layer + self.store


@dataclass(frozen=True, slots=True)
class Report:
    """The guest's newest scan: pages by what the guest says of them, resident or not."""

    age_s: float
    unused: int
    volatile: int
    potential: int
    stable: int


@dataclass(frozen=True, slots=True)
class Epoch:
    """The epoch that ended last. Pages; names as in ``hva_host.agent.model.EpochStats``.

    :ivar number: goes up by at least 1 from epoch to epoch of a VM, whoever ordered it.
    :ivar candidates: present once protected.
    :ivar later: not tried yet: until more is known of their region, or because the step was full.
    :ivar resting: not tried: their region, or they themselves, came back lately.
    :ivar scan_s: of guest CPU that a scan takes.
    :ivar scanned: it began with one; else it went by an earlier report.
    :ivar total_s: from beginning to end.
    :ivar note: why it ended early, or "".
    """

    number: int
    age_s: float
    candidates: int
    discarded_zero: int
    discarded_layer: int
    discarded_store: int
    later: int = 0
    resting: int = 0
    scan_s: float = 0.0
    total_s: float = 0.0
    note: str = ""
    scanned: bool = True

    @property
    def discarded(self) -> int:
        return self.discarded_zero + self.discarded_layer + self.discarded_store


@dataclass(frozen=True, slots=True)
class GuestWord:
    """What the guest says of its own memory; each is believed only to the guest's own harm.

    :ivar psi_some: share of time that some, and ``psi_full`` that all, of its tasks waited for memory, over 10 s;
        None where its kernel has no PSI.
    :ivar workingset_refaults: pages its kernel read again soon after having evicted them (/proc/vmstat,
        workingset_refault_file + workingset_refault_anon), cumulative since it booted.
    """

    age_s: float
    total_bytes: int
    available_bytes: int
    psi_some: float | None = None
    psi_full: float | None = None
    workingset_refaults: int | None = None


@dataclass(frozen=True, slots=True)
class VmSample:
    """One look at a VM.

    :ivar refused: why discarding is refused at present, or "".
    :ivar memory_bytes: of guest RAM.
    :ivar zero_pages: discarded pages by residence: ZERO, LAYER and PRESERVED.
    :ivar filled_pages: that answers to faults brought, fault-around included; cumulative.
    :ivar stall_s: that vCPUs waited; cumulative.
    :ivar pager_cpu_s: cumulative.
    :ivar report: None: the guest never reported.
    :ivar cold_pages: resident pages that samples show to be out of use (``hva_host.pager.coldness.Coldness.cold``).
    :ivar epoch: the last one that ended, of whatever mode; None: there was none.
    :ivar guest: None: it was never heard, or its agent can not say.
    :ivar balloon_bytes: what the guest has now with what its balloon leaves it; None: it has no balloon.
    :ivar ballooned_bytes: that policy took by the balloon; what somebody else took is not given back.
    :ivar busy: something that was ordered is still being done; None: it is not known.
    """

    name: str
    at_s: float
    condition: Condition
    guest_connected: bool
    memory_bytes: int
    backing_bytes: int
    store_bytes: int
    refused: str = ""
    zero_pages: int = 0
    layer_pages: int = 0
    preserved_pages: int = 0
    refaults: Refaults = Refaults()
    filled_pages: int = 0
    stall_s: float = 0.0
    write_faults: int = 0
    pager_cpu_s: float = 0.0
    report: Report | None = None
    cold_pages: int = 0
    epoch: Epoch | None = None
    guest: GuestWord | None = None
    balloon_bytes: int | None = None
    ballooned_bytes: int = 0
    busy: bool | None = None


@dataclass(frozen=True, slots=True)
class Cgroup:
    """Of the control groups that hold all our VMs, the one that leaves least; page cache not in use counts as free."""

    limit_bytes: int
    usage_bytes: int

    @property
    def left_bytes(self) -> int:
        """Negative where the limit was lowered below what is used."""
        return self.limit_bytes - self.usage_bytes


@dataclass(frozen=True, slots=True)
class HostSample:
    """One look at the host.

    :ivar psi_some: share of time that some process waited for memory, over 10 s; None: the kernel does not say.
    :ivar psi_some_us: the same, cumulative microseconds.
    :ivar cgroup: None: no limit below the host's own.
    """

    at_s: float
    total_bytes: int
    available_bytes: int
    psi_some: float | None = None
    psi_full: float | None = None
    psi_some_us: int | None = None
    psi_full_us: int | None = None
    cgroup: Cgroup | None = None
    swap_total_bytes: int = 0
    swap_free_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Look:
    """All that is decided on at once.

    :ivar host: None: it could not be found out; then there is no pressure.
    :ivar silent: VMs that could not be looked at this time; what is known of them stays.
    :ivar others_bytes: backing and store of those, as it was last, and of VMs that policy does not decide on.
    """

    host: HostSample | None
    vms: tuple[VmSample, ...]
    silent: tuple[str, ...] = ()
    others_bytes: int = 0

    @property
    def held_bytes(self) -> int:
        """Backing and store of all VMs."""
        return self.others_bytes + sum(vm.backing_bytes + vm.store_bytes for vm in self.vms)


@dataclass(frozen=True, slots=True)
class Limits:
    """What users set: per VM and of the fleet (``hvaqemu.fleet_config``).

    :ivar reclaim: by VM's name; a VM that is not there is left alone.
    :ivar budget_bytes: for backing and store of all VMs; None: no such bound.
    :ivar available_bytes: of the host that are kept available; None: by its size (``shortage.available_least``).
    :ivar psi_some: share of time beyond which the host counts as short.
    :ivar cgroup_headroom: share of a cgroup's limit that is kept free.
    :ivar balloon: whether balloons may be used.
    """

    reclaim: dict[str, ReclaimConfig] = field(default_factory=dict)
    budget_bytes: int | None = None
    available_bytes: int | None = None
    psi_some: float = 0.1
    cgroup_headroom: float = 0.05
    balloon: bool = True
