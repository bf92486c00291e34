"""What the host agent says of a VM: the one model behind tables, plots, ``--json``, reports and the control socket.

Sizes are bytes, times are seconds, pages are pages of 4 KiB, unless a name says otherwise.
"""

from __future__ import annotations

import enum

from pydantic import BaseModel, ConfigDict


class VmState(enum.StrEnum):
    """Where a VM is in its life, as the host agent sees it."""

    STARTING = "starting"
    RUNNING = "running"
    PAUSED = "paused"
    HELD = "held"
    PANICKED = "panicked"
    STOPPING = "stopping"
    GONE = "gone"


class Record(BaseModel):
    """A value: frozen, strict about its fields, the same as JSON and back."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class StoreSize(Record):
    """What a VM's compressed store occupies."""

    store_bytes: int
    #: Of a store that is a file on a disk, how much the host's page cache holds; None: the store is in memory.
    store_cached_bytes: int | None = None

    @property
    def store_memory_bytes(self) -> int:
        """What of it is in the host's memory."""
        return self.store_bytes if self.store_cached_bytes is None else self.store_cached_bytes


class Measure(StoreSize):
    """A VM's memory and what it costs, all read within a few milliseconds."""

    uptime_s: float
    backing_bytes: int
    resident_pages: int
    zero_pages: int
    layer_pages: int
    preserved_pages: int
    #: Fault events answered with a fill, and pages those fills brought (fault-around included).
    refaults: int
    refault_pages: int
    #: Of the refaults, those answered with zeros, from a layer, and from the compressed store.
    zero_refaults: int = 0
    layer_refaults: int = 0
    preserved_refaults: int = 0
    #: Pages of those that were read from a layer.
    layer_pages_loaded: int = 0
    #: Discarded pages that became ZERO, and so come from nowhere any more, because the guest had freed them.
    freed_pages: int = 0
    #: Pages that epochs have discarded since the VM started.
    discarded_pages: int = 0
    #: Fault events at pages that had never been touched, or that QEMU itself had discarded; they are no refaults.
    first_touches: int = 0
    #: Processor time used.
    qemu_cpu_s: float = 0.0
    pager_cpu_s: float = 0.0
    agent_cpu_s: float = 0.0
    #: QEMU's own memory, guest RAM excluded.
    qemu_rss_bytes: int
    #: What it shares with other pagers and their parent divided by how many share it.
    pager_pss_bytes: int
    #: The host agent's process, shared by all its VMs.
    agent_rss_bytes: int
    #: How much of the VM's layers the host's page cache holds; shared between VMs, droppable by the host.
    layer_cached_bytes: int
    #: MemFree as the guest reports it; -1 where the guest agent does not answer.
    guest_free_bytes: int


class Sample(StoreSize):
    """One point of a VM's timeline; cheap enough for several a second."""

    #: Seconds since the VM started.
    at_s: float
    backing_bytes: int
    zero_pages: int
    layer_pages: int
    preserved_pages: int
    refault_pages: int
    #: Faults answered with zeros, from a layer, and from the compressed store.
    zero_refaults: int = 0
    layer_refaults: int = 0
    preserved_refaults: int = 0
    #: Pages by state in the guest's newest scan (names of ``PageState`` in lower case); empty before the first.
    states: dict[str, int] = {}


class PhaseSeconds(Record):
    """Where the time of an epoch went."""

    scan: float = 0.0
    protect: float = 0.0
    prove: float = 0.0
    preserve: float = 0.0
    confirm: float = 0.0
    discard: float = 0.0
    #: The guest stood still for so long, so that direct I/O could end.
    paused: float = 0.0
    total: float = 0.0


class EpochStats(Record):
    """What one epoch did, in pages. candidates = discarded + touched + unmatched + unconfirmed + unpreserved."""

    number: int
    #: When it ended, in seconds since the VM started.
    at_s: float = 0.0
    #: Candidates that were present once protected.
    candidates: int
    #: Pages whose proof held.
    proven: int
    #: Pages an event (write, fill, unprotect) took out of the epoch.
    touched: int
    #: Copies whose bytes no layer holds.
    unmatched: int
    #: UNUSED candidates that two scans did not confirm in time.
    unconfirmed: int
    #: STABLE candidates that do not compress, or that the store had no room for.
    unpreserved: int
    #: Pages that were no candidates: until more is known of their region or because enough were, and because they
    #: were used lately.
    later: int
    resting: int
    discarded: int
    discarded_zero: int
    discarded_layer: int
    discarded_store: int
    #: Discarded pages the guest has freed since: they come back as zeros, not from layer or store.
    freed: int = 0
    #: Of all discarded, those that the guest said are of its swap cache.
    discarded_swap_cache: int = 0
    resident_before: int
    seconds: PhaseSeconds
    #: Transactions it was done in, and the longest time pages stayed protected in one.
    slices: int = 1
    protected_s: float
    #: Why the epoch ended early, or "".
    note: str = ""


class StallBucket(Record):
    """Waits of at most ``upper_s`` seconds and of more than half of that."""

    upper_s: float
    count: int


class StallStats(Record):
    """How long vCPUs (and QEMU's threads) waited for the pager, from a fault being readable to its wake-up."""

    count: int = 0
    sum_s: float = 0.0
    median_s: float = 0.0
    p99_s: float = 0.0
    longest_s: float = 0.0
    #: A histogram of factors of two, shortest waits first; empty buckets are left out.
    buckets: list[StallBucket] = []


class HeldPages(Record):
    """Faults the pager must not answer, because the bytes it would serve are not the right ones."""

    layer: str
    pages: list[int]
    reason: str


class DiskStatus(Record):
    """A disk whose writes go to files of the VM's own; bytes on the host."""

    disk: str
    #: Frozen files, and how many of them pages are matched with.
    frozen: int
    indexed: int
    written_bytes: int
    frozen_bytes: int
    #: Of merged files that pages still depend on.
    retired_bytes: int


class FrozenDisk(Record):
    """What freezing a disk came to."""

    disk: str
    #: The file that was frozen; None: nothing was written to the disk since the last time, and nothing was done.
    layer: str | None
    bytes: int
    #: Until the guest wrote to the new file, and then until pages were matched with the frozen one.
    seconds: float
    index_seconds: float


class PolicyStatus(Record):
    """What policy does with a VM, and why."""

    mode: str
    #: "idle" where it does nothing by itself.
    phase: str = "idle"
    reason: str = ""
    #: Seconds until it may do something again; None: it does nothing by itself.
    again_s: float | None = None
    #: Estimated; None: not known (yet).
    working_set_bytes: int | None = None
    #: Accesses to discarded pages a minute, over the last minute; and what they are held to in mode proactive.
    refaults_per_minute: float | None = None
    budget_per_minute: float | None = None
    target_bytes: int | None = None


class NetworkStatus(Record):
    """How a VM is reached."""

    #: ``none``, ``user`` or ``tap``.
    type: str
    mac: str = ""
    #: The guest's; "": none, or one that it is told by DHCP.
    address: str = ""
    #: [ADDRESS:]PORT of the host, and of the guest; of a user network.
    forward: list[str] = []
    #: In the host's own namespace: the tap device, or the host's end of the link into the VM's namespace.
    device: str = ""
    bridge: str = ""
    namespace: str = ""


class VmStatus(Record):
    """All that ``status NAME`` shows."""

    name: str
    state: VmState
    reason: str = ""
    #: "", or why nothing is being discarded.
    reclaim_refused: str = ""
    pid: int
    pager_pid: int
    #: Pager restarts and the longest time faults went unanswered because of one.
    pager_restarts: int = 0
    pager_pause_s: float = 0.0
    guest_connected: bool
    guest_kernel: str = ""
    memory_bytes: int
    measure: Measure | None = None
    #: Pages by state in the guest's newest scan, as in a :class:`Sample`.
    states: dict[str, int] = {}
    epochs: list[EpochStats] = []
    stalls: StallStats = StallStats()
    held: list[HeldPages] = []
    disks: list[DiskStatus] = []
    policy: PolicyStatus | None = None
    #: None: an earlier version of hvaqemu started it.
    network: NetworkStatus | None = None


class ReclaimResult(Record):
    """What a ``reclaim`` did."""

    epochs: list[EpochStats]
    discarded: int
    backing_before_bytes: int
    backing_after_bytes: int
    store_before_bytes: int
    store_after_bytes: int
    seconds: float


class ExecResult(Record):
    """How a command in the guest ended. Output is the guest's: escape it before printing."""

    exit_status: int | None
    signal: int | None = None
    timed_out: bool = False
    stdout: bytes = b""
    stderr: bytes = b""
    #: Output beyond the bound was dropped.
    truncated: bool = False

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_bytes="base64", val_json_bytes="base64")

    @property
    def ok(self) -> bool:
        return self.exit_status == 0 and not self.timed_out
