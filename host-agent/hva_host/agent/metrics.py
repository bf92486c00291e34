"""What Prometheus is told, from the same records as everything else (:mod:`hva_host.agent.model`).

Names and types follow https://prometheus.io/docs/practices/naming: base units, ``_total`` for what only grows. Labels
are names of VMs and disks from their configuration, and values of our own enums: no text of a guest ever is one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
)
from prometheus_client.metrics_core import Metric

from hva_host.agent.model import EpochStats, Measure, PhaseSeconds, PolicyStatus, StallStats, VmState, VmStatus
from hva_host.policy.decisions import Phase
from hvaqemu import __version__
from hvaqemu.pages import PAGE_SIZE, PageState

#: Upper bounds of the histogram of waits in seconds, 1.6 µs to 107 s; each is one of the records' own.
_WAITS = [1e-7 * 2.0**power for power in range(4, 31)]


class Snapshot(NamedTuple):
    """All VMs and the host agent at one moment."""

    vms: list[VmStatus]
    #: Names of VMs whose figures could not be had in time.
    silent: list[str]
    agent_memory_bytes: int
    agent_cpu_s: float
    #: How long it took to look.
    seconds: float


class _Figure(NamedTuple):
    """One metric of a VM: its values by those of its further labels. No value: nothing is exported."""

    name: str
    help: str
    values: Callable[[VmStatus], Mapping[tuple[str, ...], float]]
    labels: tuple[str, ...] = ()
    counter: bool = False


def _one(value: float) -> dict[tuple[str, ...], float]:
    return {(): value}


def _of_measure(value: Callable[[Measure], float]) -> Callable[[VmStatus], Mapping[tuple[str, ...], float]]:
    return lambda vm: {} if vm.measure is None else _one(value(vm.measure))


def _of_epoch(value: Callable[[EpochStats], float]) -> Callable[[VmStatus], Mapping[tuple[str, ...], float]]:
    return lambda vm: _one(value(vm.epochs[-1])) if vm.epochs else {}


def _of_policy(value: Callable[[PolicyStatus], float | None]) -> Callable[[VmStatus], Mapping[tuple[str, ...], float]]:
    def values(vm: VmStatus) -> dict[tuple[str, ...], float]:
        found = value(vm.policy) if vm.policy is not None else None
        return {} if found is None else _one(found)

    return values


def _policy_phase(vm: VmStatus) -> dict[tuple[str, ...], float]:
    return {(phase.value,): float(vm.policy.phase == phase) for phase in Phase} if vm.policy is not None else {}


def _residence(vm: VmStatus) -> dict[tuple[str, ...], float]:
    if vm.measure is None:
        return {}
    pages = {name: getattr(vm.measure, f"{name}_pages") for name in ("resident", "zero", "layer", "preserved")}
    return {(name,): count * PAGE_SIZE for name, count in pages.items()}


def _states(vm: VmStatus) -> dict[tuple[str, ...], float]:
    known = [state.name.lower() for state in PageState]
    return {(name,): vm.states.get(name, 0) * PAGE_SIZE for name in known} if vm.states else {}


def _refaults(vm: VmStatus) -> dict[tuple[str, ...], float]:
    if vm.measure is None:
        return {}
    return {(name,): getattr(vm.measure, f"{name}_refaults") for name in ("zero", "layer", "preserved")}


def _disks(vm: VmStatus) -> dict[tuple[str, ...], float]:
    return {
        (disk.disk, files): getattr(disk, f"{files}_bytes")
        for disk in vm.disks
        for files in ("written", "frozen", "retired")
    }


def _phases(vm: VmStatus) -> dict[tuple[str, ...], float]:
    if not vm.epochs:
        return {}
    seconds = vm.epochs[-1].seconds
    return {(name,): getattr(seconds, name) for name in PhaseSeconds.model_fields if name != "total"}


_FIGURES = (
    _Figure("state", "1 for the state the VM is in, 0 for every other.",
            lambda vm: {(state.value,): float(vm.state is state) for state in VmState}, ("state",)),
    _Figure("uptime_seconds", "Since the VM's QEMU was started.", _of_measure(lambda m: m.uptime_s)),
    _Figure("memory_bytes", "Memory the guest was given.", lambda vm: _one(vm.memory_bytes)),
    _Figure("backing_bytes", "Host memory that guest RAM really occupies.", _of_measure(lambda m: m.backing_bytes)),
    _Figure("residence_bytes", "Guest RAM by where its bytes are: resident; or discarded, to come back as zeros, from "
            "a layer or from the compressed store.", _residence, ("residence",)),
    _Figure("guest_bytes", "Guest RAM by page state in the guest's newest scan.", _states, ("state",)),
    _Figure("guest_free_bytes", "MemFree as the guest reports it.",
            lambda vm: _one(vm.measure.guest_free_bytes) if vm.measure and vm.measure.guest_free_bytes >= 0 else {}),
    _Figure("guest_agent_connected", "1 while the agent in the guest is connected.",
            lambda vm: _one(vm.guest_connected)),
    _Figure("store_bytes", "Host memory that the compressed store of paged-out pages occupies.",
            _of_measure(lambda m: m.store_memory_bytes)),
    _Figure("layer_cached_bytes", "How much of the VM's layers the host's page cache holds; shared between VMs, and "
            "the host may drop it.", _of_measure(lambda m: m.layer_cached_bytes)),
    _Figure("qemu_memory_bytes", "QEMU's own memory, guest RAM excluded.", _of_measure(lambda m: m.qemu_rss_bytes)),
    _Figure("qemu_cpu_seconds", "Processor time of QEMU, the guest's included.", _of_measure(lambda m: m.qemu_cpu_s),
            counter=True),
    _Figure("pager_memory_bytes", "The pager's memory, what it shares with others divided by how many share it.",
            _of_measure(lambda m: m.pager_pss_bytes)),
    _Figure("pager_cpu_seconds", "Processor time of the VM's present pager.", _of_measure(lambda m: m.pager_cpu_s),
            counter=True),
    _Figure("pager_restarts", "Pagers that were replaced.", lambda vm: _one(vm.pager_restarts), counter=True),
    _Figure("refaults", "Faults on discarded pages, by what answered them.", _refaults, ("source",), counter=True),
    _Figure("refaulted_bytes", "Brought back by refaults, neighbours and read-ahead included.",
            _of_measure(lambda m: m.refault_pages * PAGE_SIZE), counter=True),
    _Figure("layer_loaded_bytes", "Of that, read from a layer.",
            _of_measure(lambda m: m.layer_pages_loaded * PAGE_SIZE), counter=True),
    _Figure("discarded_bytes", "Discarded by epochs.", _of_measure(lambda m: m.discarded_pages * PAGE_SIZE),
            counter=True),
    _Figure("freed_bytes", "Discarded pages that the guest freed since, so that no old content is loaded for them.",
            _of_measure(lambda m: m.freed_pages * PAGE_SIZE), counter=True),
    _Figure("held_pages", "Pages whose fault must not be answered: the guest stands still.",
            lambda vm: _one(sum(len(held.pages) for held in vm.held))),
    _Figure("reclaim_refused", "1 while something makes discarding unsafe; status says what.",
            lambda vm: _one(bool(vm.reclaim_refused))),
    _Figure("last_epoch_candidates_bytes", "Candidates of the last epoch.",
            _of_epoch(lambda e: e.candidates * PAGE_SIZE)),
    _Figure("last_epoch_discarded_bytes", "Discarded by the last epoch.", _of_epoch(lambda e: e.discarded * PAGE_SIZE)),
    _Figure("last_epoch_protected_seconds", "The longest time pages stayed protected in the last epoch.",
            _of_epoch(lambda e: e.protected_s)),
    _Figure("last_epoch_phase_seconds", "Where the time of the last epoch went.", _phases, ("phase",)),
    _Figure("policy_phase", "1 for what policy does with the VM at present, 0 for everything else.", _policy_phase,
            ("phase",)),
    _Figure("working_set_bytes", "As policy estimates it.", _of_policy(lambda p: p.working_set_bytes)),
    _Figure("target_bytes", "What backing and store are held to in mode target.",
            _of_policy(lambda p: p.target_bytes)),
    _Figure("refaults_per_second", "Accesses to discarded pages over the last minute, as policy counts them.",
            _of_policy(lambda p: None if p.refaults_per_minute is None else p.refaults_per_minute / 60)),
    _Figure("refaults_allowed_per_second", "What policy holds them to in mode proactive.",
            _of_policy(lambda p: None if p.budget_per_minute is None else p.budget_per_minute / 60)),
    _Figure("disk_bytes", "Files of the VM's own disks: written to, frozen, and merged away but still needed.", _disks,
            ("disk", "files")),
)  # fmt: skip


class FleetCollector:
    """Collects a snapshot for the client library (``generate_latest``)."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot

    def collect(self) -> Iterator[Metric]:
        """Every metric with its samples."""
        taken = self._snapshot
        yield InfoMetricFamily("hvaqemu_build", "The host agent's version.", {"version": __version__})
        yield GaugeMetricFamily("hvaqemu_vms", "VMs of this host agent.", len(taken.vms) + len(taken.silent))
        yield GaugeMetricFamily(
            "hvaqemu_agent_memory_bytes", "Resident memory of the host agent.", taken.agent_memory_bytes
        )
        yield CounterMetricFamily("hvaqemu_agent_cpu_seconds", "Processor time of the host agent.", taken.agent_cpu_s)
        yield GaugeMetricFamily(
            "hvaqemu_agent_collect_seconds", "How long it took to look at all VMs for this answer.", taken.seconds
        )
        answered = GaugeMetricFamily(
            "hvaqemu_vm_answered", "1 if the VM's figures could be had in time.", labels=["vm"]
        )
        for name, value in [
            *((vm.name, vm.measure is not None) for vm in taken.vms),
            *((n, False) for n in taken.silent),
        ]:
            answered.add_metric([name], value)
        yield answered
        for figure in _FIGURES:
            yield _family(figure, taken.vms)
        yield _waits(taken.vms)


def _family(figure: _Figure, vms: list[VmStatus]) -> Metric:
    family: Any = (CounterMetricFamily if figure.counter else GaugeMetricFamily)(
        f"hvaqemu_vm_{figure.name}", figure.help, labels=["vm", *figure.labels]
    )
    for vm in vms:
        for labels, value in figure.values(vm).items():
            family.add_metric([vm.name, *labels], value)
    return family  # type: ignore[no-any-return]


def _waits(vms: list[VmStatus]) -> Metric:
    family = HistogramMetricFamily(
        "hvaqemu_vm_stall_seconds",
        "How long vCPUs (and QEMU's threads) waited for the pager, from a fault being readable to its wake-up.",
        labels=["vm"],
    )
    for vm in vms:
        if vm.measure is not None:
            family.add_metric([vm.name], _cumulative(vm.stalls), vm.stalls.sum_s)
    return family


def _cumulative(stalls: StallStats) -> list[tuple[str, float]]:
    counts = [(bucket.upper_s, bucket.count) for bucket in stalls.buckets]
    # Bounds of both are the same powers of two; a little is added for the rounding of either.
    below = [(repr(bound), sum(count for upper, count in counts if upper <= bound * 1.01)) for bound in _WAITS]
    return [*below, ("+Inf", stalls.count)]
