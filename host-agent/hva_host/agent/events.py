"""Every event that is told: to clients of the control socket, and in the event logs.

Who has something to tell gives a name and data (a :data:`hva_host.agent.condition.Listener`); what the data must be
stands here, and docs/control.md is made from it. Text in them may be the guest's: escape it before printing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import ValidationError

from hva_host.agent.guest_session import LinkState
from hva_host.agent.model import EpochStats, HeldPages, Record, VmState
from hva_host.policy.decisions import Complaint
from hvaqemu.reclaim_config import ReclaimConfig


class Event(Record):
    """What all events have in common: nothing but that they are records."""

    #: A warning in the host agent's log: it takes an operator.
    loud: ClassVar[bool] = False


class VmEvent(Event):
    """Something that happened to a VM."""

    #: The VM's.
    name: str


class VmProgress(VmEvent):
    """A stage of a `vm-up` begins."""

    text: str


class VmStateChanged(VmEvent):
    """The VM is in another state."""

    state: VmState
    #: Why, or "".
    reason: str


class VmReset(VmEvent):
    """The guest was reset."""

    #: Whether it asked for that itself.
    guest: bool


class VmHeld(VmEvent):
    """Faults must not be answered, because the bytes would not be the right ones: the guest stands still. Said again
    when others are held."""

    loud = True

    held: list[HeldPages]


class VmReleased(VmEvent):
    """No page is held any more."""


class VmNotAdopted(VmEvent):
    """A VM of an earlier host agent could not be taken over, or was found dead and cleared away."""

    loud = True

    error: str


class VmNotStarted(VmEvent):
    """A VM of the fleet file could not be started."""

    loud = True

    error: str


class GuestAgent(VmEvent):
    """The link to the guest's agent is in another state; few of many quick changes are told."""

    state: LinkState


class Epoch(VmEvent):
    """An epoch has ended."""

    #: As in a status.
    stats: EpochStats


class ReclaimConfigChanged(VmEvent):
    """The VM's memory is reclaimed differently from now on."""

    #: The keys of `reclaim` in its file.
    reclaim: ReclaimConfig


class ReclaimRefused(VmEvent):
    """Something makes discarding unsafe. Said again when the reasons change."""

    loud = True

    #: All of them in one line.
    reason: str


class ReclaimAllowed(VmEvent):
    """Nothing makes discarding unsafe any more."""

    reason: str


class PolicyWarning(Event):
    """Policy can not reach what it is to, and says so again every minute while that holds."""

    loud = True

    #: The VM's, or "" where it is about the host.
    name: str
    complaint: Complaint
    missing_bytes: int
    reason: str


class LayerWriter(VmEvent):
    """Somebody has a layer's file open for writing: nothing more is discarded."""

    loud = True

    layer: str
    reason: str


class LayerChanged(VmEvent):
    """A layer's file has changed, has gone or can not be read: nothing more is discarded."""

    loud = True

    layer: str
    reason: str


class LayerTrusted(VmEvent):
    """A layer's file holds what was indexed, and nobody has it open for writing."""

    layer: str
    reason: str


class LayerIndexing(VmEvent):
    """How far indexing a frozen file has come."""

    layer: str
    #: Bytes.
    done: int
    size: int


class LayerAdded(VmEvent):
    """Pages may depend on a file from now on."""

    layer: str
    bytes: int


class LayerDropped(VmEvent):
    """No page depends on a file any more."""

    layer: str


class Frozen(VmEvent):
    """What the guest wrote to a disk is in a file that does not change any more; it writes to another."""

    disk: str
    layer: str


class FreezeBudget(VmEvent):
    """The VM's disks occupy more than their budget: nothing is frozen by itself any more."""

    loud = True

    #: Bytes.
    used: int
    budget: int


class FreezeFailed(VmEvent):
    """A freeze or merge that was due could not be done; it is tried again."""

    loud = True

    error: str


class DeleteFailed(VmEvent):
    """A merged file could not be deleted; it is tried again, and told once."""

    loud = True

    #: The file.
    layer: str
    error: str


class Merging(VmEvent):
    """How far merging frozen files has come."""

    disk: str
    #: Bytes.
    done: int
    size: int


class MergeEnded(VmEvent):
    """Merging frozen files has ended."""

    disk: str
    #: Bytes.
    done: int
    size: int
    #: "" if it came to its end.
    error: str


class PagerLost(VmEvent):
    """The VM's pager has ended or does not answer. Faults wait for the next."""

    loud = True

    pid: int


class PagerStarted(VmEvent):
    """A new pager answers."""

    pid: int
    #: How long nobody did.
    seconds: float


class PagerFailed(VmEvent):
    """No pager could be started; the VM is HELD, and it is tried again."""

    loud = True

    error: str


class TaskFailed(Event):
    """A task of the host agent's own met with a bug; agent.log has the traceback."""

    loud = True

    #: The VM it was of; None: of no single one.
    name: str | None = None
    task: str
    error: str


class FleetFileRead(Event):
    """The fleet file was taken up."""

    path: str
    #: Names.
    vms: list[str]


class FleetFileRefused(Event):
    """The fleet file is wrong; all stays as it was."""

    loud = True

    error: str


#: By the names they have on the wire.
EVENTS: dict[str, type[Event]] = {
    "VM_PROGRESS": VmProgress,
    "VM_STATE": VmStateChanged,
    "VM_RESET": VmReset,
    "VM_HELD": VmHeld,
    "VM_RELEASED": VmReleased,
    "VM_NOT_ADOPTED": VmNotAdopted,
    "VM_NOT_STARTED": VmNotStarted,
    "GUEST_AGENT": GuestAgent,
    "EPOCH": Epoch,
    "RECLAIM_CONFIG": ReclaimConfigChanged,
    "RECLAIM_REFUSED": ReclaimRefused,
    "RECLAIM_ALLOWED": ReclaimAllowed,
    "POLICY_WARNING": PolicyWarning,
    "LAYER_WRITER": LayerWriter,
    "LAYER_CHANGED": LayerChanged,
    "LAYER_TRUSTED": LayerTrusted,
    "LAYER_INDEXING": LayerIndexing,
    "LAYER_ADDED": LayerAdded,
    "LAYER_DROPPED": LayerDropped,
    "FROZEN": Frozen,
    "FREEZE_BUDGET": FreezeBudget,
    "FREEZE_FAILED": FreezeFailed,
    "DELETE_FAILED": DeleteFailed,
    "MERGING": Merging,
    "MERGE_ENDED": MergeEnded,
    "PAGER_LOST": PagerLost,
    "PAGER_STARTED": PagerStarted,
    "PAGER_FAILED": PagerFailed,
    "TASK_FAILED": TaskFailed,
    "FLEET_FILE": FleetFileRead,
    "FLEET_FILE_REFUSED": FleetFileRefused,
}


def what_is_wrong(event: str, data: Mapping[str, Any]) -> str:
    """In what an event is not one of those above; "" for one that is."""
    kind = EVENTS.get(event)
    if kind is None:
        return f"event {event} is not in {__name__}"
    try:
        kind.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        return f"event {event}: {'.'.join(map(str, first['loc']))}: {first['msg']}"
    return ""


def is_loud(event: str) -> bool:
    """Does it take an operator?"""
    return event in EVENTS and EVENTS[event].loud
