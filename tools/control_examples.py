"""An exchange with the control socket for each command, and each event once; for docs/control.md."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hva_host.agent import control_returns as returns
from hva_host.agent import events
from hva_host.agent.control_wire import version
from hva_host.agent.guest_session import LinkState
from hva_host.agent.history import VmReport
from hva_host.agent.model import (
    EpochStats,
    ExecResult,
    FrozenDisk,
    HeldPages,
    Measure,
    PhaseSeconds,
    ReclaimResult,
    Record,
    Sample,
    VmState,
    VmStatus,
)
from hva_host.policy.decisions import Complaint
from hvaqemu.reclaim_config import ReclaimConfig, ReclaimMode

_VM: Mapping[str, Any] = {"name": "web"}
_BASE = "/var/cache/hvaqemu/images/debian-s390x/root.raw"
_LAYER = "/var/lib/hvaqemu/vms/web/root.qcow2"

_STATUS = VmStatus(
    name="web",
    state=VmState.RUNNING,
    pid=4321,
    pager_pid=4330,
    guest_connected=True,
    guest_kernel="Linux 6.1.0-37-s390x s390x",
    memory_bytes=512 << 20,
)
_MEASURE = Measure(
    uptime_s=93.2,
    backing_bytes=47 << 20,
    resident_pages=12032,
    zero_pages=78110,
    layer_pages=31200,
    preserved_pages=0,
    refaults=812,
    refault_pages=9411,
    zero_refaults=390,
    layer_refaults=422,
    layer_pages_loaded=5120,
    freed_pages=64,
    qemu_rss_bytes=54 << 20,
    pager_pss_bytes=6 << 20,
    agent_rss_bytes=61 << 20,
    store_bytes=0,
    layer_cached_bytes=200 << 20,
    guest_free_bytes=320 << 20,
)
_EPOCH = EpochStats(
    number=7,
    candidates=1603,
    proven=1590,
    touched=9,
    unmatched=4,
    unconfirmed=0,
    unpreserved=0,
    later=0,
    resting=0,
    discarded=1590,
    discarded_zero=1200,
    discarded_layer=390,
    discarded_store=0,
    resident_before=13622,
    seconds=PhaseSeconds(scan=0.05, protect=0.001, prove=0.004, confirm=0.11, discard=0.002, total=0.17),
    protected_s=0.117,
)
_SAMPLE = Sample(
    at_s=93.2,
    backing_bytes=47 << 20,
    zero_pages=78110,
    layer_pages=31200,
    preserved_pages=0,
    store_bytes=0,
    refault_pages=9411,
)

#: By command: its arguments, and what it returns. Values that are as they are by default are left out of the page.
COMMANDS: dict[str, tuple[Mapping[str, Any], object]] = {
    "query-commands": ({}, [returns.CommandName(name=name) for name in ("qmp_capabilities", "query-commands", "quit")]),
    "query-version": ({}, returns.Version.model_validate(version())),
    "query-vms": ({}, [_STATUS]),
    "vm-up": ({"config": {"name": "web", "memory": "512M", "cpus": 2}}, _STATUS),
    "vm-down": ({**_VM, "keep_disks": True}, returns.Ended(how="the guest shut down")),
    "vm-status": (_VM, _STATUS),
    "vm-measure": (_VM, _MEASURE),
    "vm-report": (
        _VM,
        VmReport(
            status=_STATUS,
            timeline=[_SAMPLE],
            ram=[],
            configuration={"name": "web", "memory": 512 << 20},
            versions={"hvaqemu": "0.1.0", "QEMU": "7.2.15"},
        ),
    ),
    "vm-console": (_VM, returns.ConsoleLog(path="/run/hvaqemu/vms/web/console.log")),
    "vm-reclaim": (
        {**_VM, "states": ["unused"], "epochs": 1},
        ReclaimResult(
            epochs=[_EPOCH],
            discarded=1590,
            backing_before_bytes=55795712,
            backing_after_bytes=49283072,
            store_before_bytes=0,
            store_after_bytes=0,
            seconds=0.18,
        ),
    ),
    "vm-set": ({**_VM, "changes": ["mode=proactive"]}, ReclaimConfig(mode=ReclaimMode.PROACTIVE)),
    "vm-freeze": (
        {**_VM, "disk": "root"},
        returns.FrozenDisks(
            disks=[FrozenDisk(disk="root", layer=_LAYER, bytes=24 << 20, seconds=0.06, index_seconds=0.09)]
        ),
    ),
    "vm-merge": (_VM, returns.MergedFiles(merged=["/var/lib/hvaqemu/vms/web/root-1.qcow2"])),
    "vm-restore": (_VM, returns.RestoredPages(pages=109310)),
    "vm-resume": (_VM, returns.PagesStillHeld(held=0)),
    "vm-exec": ({**_VM, "argv": ["uname", "-m"]}, ExecResult(exit_status=0, stdout=b"s390x\n")),
    "vm-balloon": ({**_VM, "size": "256M"}, returns.GuestMemory(bytes=256 << 20)),
    "vm-qmp": (
        {**_VM, "command": "query-status"},
        returns.QmpReturn(returned={"status": "running", "singlestep": False, "running": True}),
    ),
    "fleet-reload": ({}, returns.Nothing()),
    "quit": ({}, returns.Nothing()),
}

#: By the event's name.
EVENTS_LIKE: dict[str, Record] = {
    "VM_PROGRESS": events.VmProgress(name="web", text="booting the guest"),
    "VM_STATE": events.VmStateChanged(name="web", state=VmState.PAUSED, reason="stopped by QMP"),
    "VM_RESET": events.VmReset(name="web", guest=True),
    "VM_HELD": events.VmHeld(name="web", held=[HeldPages(layer=_BASE, pages=[20480], reason="block 1811 has changed")]),
    "VM_RELEASED": events.VmReleased(name="web"),
    "VM_NOT_ADOPTED": events.VmNotAdopted(name="web", error="its QEMU has ended"),
    "VM_NOT_STARTED": events.VmNotStarted(name="web", error="VM web: the name is taken"),
    "GUEST_AGENT": events.GuestAgent(name="web", state=LinkState.ATTACHED),
    "EPOCH": events.Epoch(name="web", stats=_EPOCH),
    "RECLAIM_CONFIG": events.ReclaimConfigChanged(name="web", reclaim=ReclaimConfig(mode=ReclaimMode.PROACTIVE)),
    "RECLAIM_REFUSED": events.ReclaimRefused(name="web", reason="a migration is under way (active)"),
    "RECLAIM_ALLOWED": events.ReclaimAllowed(name="web", reason=""),
    "POLICY_WARNING": events.PolicyWarning(
        name="", complaint=Complaint.NOTHING_LEFT, missing_bytes=64 << 20, reason="the host is short of memory"
    ),
    "LAYER_WRITER": events.LayerWriter(name="web", layer=_BASE, reason="process 12 (dd) has it open for writing"),
    "LAYER_CHANGED": events.LayerChanged(name="web", layer=_BASE, reason="does not hold what was indexed any more"),
    "LAYER_TRUSTED": events.LayerTrusted(name="web", layer=_BASE, reason=""),
    "LAYER_INDEXING": events.LayerIndexing(name="web", layer=_LAYER, done=8 << 20, size=24 << 20),
    "LAYER_ADDED": events.LayerAdded(name="web", layer=_LAYER, bytes=24 << 20),
    "LAYER_DROPPED": events.LayerDropped(name="web", layer=_LAYER),
    "FROZEN": events.Frozen(name="web", disk="root", layer=_LAYER),
    "FREEZE_BUDGET": events.FreezeBudget(name="web", used=5 << 30, budget=4 << 30),
    "FREEZE_FAILED": events.FreezeFailed(name="web", error="the VM's disk folder: No space left on device"),
    "DELETE_FAILED": events.DeleteFailed(name="web", layer=_LAYER, error="Read-only file system"),
    "MERGING": events.Merging(name="web", disk="root", done=8 << 20, size=24 << 20),
    "MERGE_ENDED": events.MergeEnded(name="web", disk="root", done=24 << 20, size=24 << 20, error=""),
    "PAGER_LOST": events.PagerLost(name="web", pid=4330),
    "PAGER_STARTED": events.PagerStarted(name="web", pid=4388, seconds=0.04),
    "PAGER_FAILED": events.PagerFailed(name="web", error="pager: ended by signal 9"),
    "TASK_FAILED": events.TaskFailed(name="web", task="disks", error="KeyError('root')"),
    "FLEET_FILE": events.FleetFileRead(path="/etc/hvaqemu/fleet.yaml", vms=["web", "db"]),
    "FLEET_FILE_REFUSED": events.FleetFileRefused(error="fleet.yaml:3: key budget: there is no such key"),
}
