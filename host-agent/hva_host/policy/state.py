"""What policy remembers from look to look. Immutable: a decision returns what to remember next."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from hva_host.policy.decisions import Complaint, Purpose
from hva_host.policy.falling import UNSEEN, Falls
from hva_host.policy.rates import EMPTY, Window
from hva_host.policy.samples import VmSample
from hvaqemu.reclaim_config import ReclaimConfig, ReclaimState


@dataclass(frozen=True, slots=True)
class Order:
    """A step that was ordered and not seen to end yet.

    :ivar epoch: number of the last epoch before it.
    :ivar rung: of the emergency ladder at that time.
    :ivar pager_cpu_s: that the pager had used, ``refaults`` that there had been, and pages ``resident``.
    """

    epoch: int
    at_s: float
    states: tuple[ReclaimState, ...]
    pages: int
    sampled: bool
    purpose: Purpose
    rung: int
    pager_cpu_s: float
    refaults: int
    resident: int = 0


@dataclass(frozen=True, slots=True)
class Outcome:
    """An order that came to its end. Pages; nothing was discarded where it failed."""

    order: Order
    discarded: int
    later: int


@dataclass(frozen=True, slots=True)
class Empty:
    """A step for the host's sake that brought nothing worth it.

    :ivar rung: of the emergency ladder that it was on.
    :ivar resident: pages, when it was ordered or when that was seen, the more of them.
    """

    rung: int = -1
    at_s: float = -math.inf
    resident: int = 0


@dataclass(frozen=True, slots=True)
class Rest:
    """What a VM was like when there was nothing more to gain from it. Pages."""

    resident: int
    unused: int
    volatile: int
    potential: int
    until_s: float


@dataclass(frozen=True, slots=True)
class Gait:
    """How steps of one kind go.

    :ivar step: pages that the next one may have at most; 0: the fewest.
    :ivar went: pages that the last steps discarded, older ones counted for less, and ``back`` that were wanted again.
    """

    step: int = 0
    went: float = 1.0
    back: float = 1.0

    @property
    def harm(self) -> float:
        """Refaults that a discarded page makes soon, as steps so far tell. At first the worst: all."""
        return self.back / self.went


FIRST = Gait()
#: Pages that have been free for a while are mostly not wanted at once.
FIRST_FREE = Gait(back=1 / 16)


@dataclass(frozen=True, slots=True)
class ProactiveState:
    """See :mod:`hva_host.policy.proactive`.

    :ivar free: how steps of free pages go, and ``content`` of others.
    :ivar free_again_s: before that there are no free pages to take.
    :ivar done: the step that ended last, until it is judged.
    :ivar until_s: the end of the pause; None: there is none.
    :ivar pause_s: how long the last pause was to be, and ``resumed_s`` when it ended.
    :ivar level: how many of the states with content are tried, less one.
    :ivar dull: steps in a row that gained little.
    """

    free: Gait = FIRST_FREE
    content: Gait = FIRST
    free_again_s: float = -math.inf
    done: Outcome | None = None
    until_s: float | None = None
    pause_s: float = 0.0
    resumed_s: float = -math.inf
    level: int = 0
    dull: int = 0
    rest: Rest | None = None


@dataclass(frozen=True, slots=True)
class TargetState:
    """See :mod:`hva_host.policy.target`.

    :ivar active: the VM is being brought down.
    :ivar rung: how much is tried.
    :ivar before: bytes of backing and store when the last step was ordered, and ``asked`` its pages; None: judged.
    :ivar untried: most of what the last step tried could not go, and there is as much that it did not try.
    :ivar until_s: nothing before; what could not be reached is tried again then.
    :ivar pause_s: how long the next such wait is.
    """

    active: bool = False
    rung: int = 0
    before: int | None = None
    asked: int = 0
    untried: bool = False
    until_s: float = -math.inf
    pause_s: float = 0.0


@dataclass(frozen=True, slots=True)
class GuestShort:
    """See :mod:`hva_host.policy.guest_short`.

    :ivar until_s: until when the guest is left alone.
    """

    refaults: Window = EMPTY
    until_s: float = -math.inf
    reason: str = ""


@dataclass(frozen=True, slots=True)
class VmMemory:
    """Of one VM.

    :ivar seen_s: when the newest look that counted was.
    :ivar config: by which it came about; what another one may end is forgotten.
    :ivar working_set: pages, smoothed.
    :ivar earliest_s: no step before that needs a scan, so that scans stay within their share of the guest's CPU, and
        ``unscanned_s`` none at all, so that epochs stay within theirs of the host's.
    :ivar ended_s: when the last step ended, or was given up.
    :ivar failed_s: when one was seen to have failed, and ``failures`` how many of those for the host's sake, one after
        the other.
    :ivar scanned_s: when a scan was ordered last.
    :ivar done: the last step for the host's sake, until it is judged.
    :ivar empty: on this rung, and those below, it is not asked for a while.
    """

    seen_s: float = -math.inf
    config: ReclaimConfig | None = None
    refaults: Window = EMPTY
    working_set: float | None = None
    order: Order | None = None
    earliest_s: float = -math.inf
    unscanned_s: float = -math.inf
    ended_s: float = -math.inf
    failed_s: float = -math.inf
    failures: int = 0
    scanned_s: float = -math.inf
    short: GuestShort = GuestShort()
    proactive: ProactiveState = ProactiveState()
    target: TargetState = TargetState()
    done: Outcome | None = None
    empty: Empty = Empty()


@dataclass(frozen=True, slots=True)
class HostMemory:
    """Of the host. See :mod:`hva_host.policy.pressure`.

    :ivar rung: of the emergency ladder.
    :ivar since_s: when the rung was reached.
    :ivar need: bytes that were missing then, and ``held`` bytes of backing and store of all VMs.
    :ivar calm_s: since when nothing is missing; infinite: something is.
    :ivar ballooned_s: when a balloon was changed last.
    :ivar falls: how fast memory goes.
    """

    rung: int = 0
    since_s: float = -math.inf
    need: int = 0
    held: int = 0
    calm_s: float = math.inf
    ballooned_s: float = -math.inf
    falls: Falls = UNSEEN


@dataclass(frozen=True, slots=True)
class PolicyMemory:
    """Everything. The first call gets an empty one.

    :ivar said: when each warning (what, of whom) was said last.
    """

    vms: Mapping[str, VmMemory] = field(default_factory=dict)
    host: HostMemory = HostMemory()
    said: Mapping[tuple[Complaint, str], float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Facts:
    """What one look says of a VM, worked out. Pages, and pages a minute.

    :ivar rate: refaults; None: not known yet.
    :ivar unused: free pages that are resident, as far as totals tell.
    :ivar spare: resident pages beyond min_resident.
    :ivar outcome: of a step that was seen to end in this look.
    :ivar earliest_s: no step before that needs a scan; ``unscanned_s``: none at all.
    """

    now: float
    sample: VmSample
    config: ReclaimConfig
    rate: float | None
    working_set: float | None
    resident: int
    unused: int
    spare: int
    outcome: Outcome | None
    earliest_s: float
    unscanned_s: float
