"""A model of guests and a host, for policy: what it orders is done, and what that does is in the next look.

Simpler than life where life is kinder: a refault brings one page (fault-around none), pages of a group are accessed at
random, an epoch does what it does at once.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from hva_host.pager.coldness import HOT, REGION, REST_SECONDS, SHARES, WATCHED_SECONDS
from hva_host.pager.sampling import COPIES_HOT, COPIES_REST_SECONDS, COPIES_SHARES
from hva_host.policy.decide import decide
from hva_host.policy.decisions import Balloon, Decisions, Step
from hva_host.policy.samples import (
    Condition,
    Epoch,
    GuestWord,
    HostSample,
    Limits,
    Look,
    Refaults,
    Report,
    VmSample,
)
from hva_host.policy.state import PolicyMemory
from hvaqemu.pages import PAGE_SHIFT, PAGE_SIZE
from hvaqemu.reclaim_config import ReclaimState
from hvaqemu.units import MiB

UNUSED, VOLATILE, POTENTIAL, STABLE = ReclaimState
#: Of its size, what a paged-out page takes in the store.
STORED = 0.25
_PLACE = {state: place for place, state in enumerate(ReclaimState)}
_CONTENT = (VOLATILE, POTENTIAL, STABLE)


@dataclass(frozen=True)
class Group:
    """Pages of a state that are used alike: each is accessed ``rate`` times a minute."""

    state: ReclaimState
    pages: int
    rate: float


class Regions:
    """The guest's RAM in regions of up to 2 MiB, each of pages that are used alike; one array a property.

    Coldness sampling is done with each region as :mod:`hva_host.pager.coldness` does it.
    """

    def __init__(self, groups: Sequence[Group], seed: int) -> None:
        self._random = np.random.default_rng(seed)
        sizes = [
            [REGION] * (each.pages // REGION) + [each.pages % REGION] * (each.pages % REGION > 0) for each in groups
        ]
        self.group = np.repeat(np.arange(len(groups)), [len(each) for each in sizes])
        # Where a page lies says nothing of what it is.
        self.group = self._random.permutation(self.group)
        states, rates = [_PLACE[each.state] for each in groups], [each.rate for each in groups]
        self.state = np.array(states, dtype=np.int8)[self.group]
        sizes_of = [iter(each) for each in sizes]
        self.pages = np.array([next(sizes_of[place]) for place in self.group], dtype=np.int64)
        self.rate = np.array(rates, dtype=np.float64)[self.group]
        count = len(self.pages)
        self.gone = np.zeros(count, dtype=np.int64)
        #: Pages that came back lately, about.
        self.resting = np.zeros(count)
        self.step = np.zeros(count, dtype=np.int64)
        self.asked = np.full(count, np.nan)
        self.out = np.zeros(count)
        self.back = np.zeros(count)
        self.rest_until = np.full(count, -np.inf)
        self.rested = np.zeros(count)
        self.used = np.full(count, np.nan)
        self.offered = np.zeros(count)
        self.tried = np.zeros(count)

    def run(self, seconds: float) -> int:
        """Accesses of so long; pages that came back."""
        self.resting *= math.exp(-seconds / REST_SECONDS)
        some = np.flatnonzero((self.gone > 0) & (self.rate > 0))
        if not len(some):
            return 0
        back = self._random.binomial(self.gone[some], -np.expm1(-self.rate[some] * seconds / 60))
        self.gone[some] -= back
        self.back[some] += back
        self.resting[some] += back
        return int(back.sum())

    def take(self, state: ReclaimState, most: int, now: float, *, sampled: bool) -> tuple[int, int]:
        """Discard pages of a state; how many, and how many are left."""
        mine = np.flatnonzero(self.state == _PLACE[state])
        resident = (self.pages - self.gone)[mine]
        wanted = self._choose(mine, resident, now) if sampled and state is not UNUSED else resident
        before = np.cumsum(wanted) - wanted
        if state is UNUSED or not sampled:
            wanted = np.minimum(wanted, np.maximum(0, most - before))
        else:
            # Whole regions, or they would be judged by a part of their sample.
            wanted = np.where(before < most, wanted, 0)
        chosen = mine[wanted > 0]
        self.asked[chosen] = now
        self.gone[mine] += wanted
        self.out[mine] += wanted
        self.tried[mine] += wanted
        return int(wanted.sum()), int((resident - wanted).sum())

    def _choose(self, mine: NDArray[np.int64], resident: NDArray[np.int64], now: float) -> NDArray[np.int64]:
        asked = self.asked[mine]
        watched = now - asked >= WATCHED_SECONDS
        looked = watched | (np.isnan(asked) & (self.back[mine] > 0))
        paged_out = self.state[mine] == _PLACE[STABLE]
        out = np.where(self.out[mine] > 0, self.out[mine], REGION / 4)
        hot = looked & (self.back[mine] > np.where(paged_out, HOT, COPIES_HOT) * out)
        known, share = self.used[mine], np.minimum(1, self.back[mine] / out)
        learned = looked & (self.out[mine] > 0)
        self.used[mine] = np.where(learned, np.where(np.isnan(known), share, (known + share) / 2), known)
        most = np.where(paged_out, REST_SECONDS, COPIES_REST_SECONDS)
        rested = np.where(hot, np.clip(2 * self.rested[mine], REST_SECONDS, most), self.rested[mine])
        self.rested[mine] = np.where(watched & ~hot, 0, rested)
        self.rest_until[mine] = np.where(hot, now + rested, self.rest_until[mine])
        last = np.where(paged_out, len(SHARES) - 1, len(COPIES_SHARES) - 1)
        step = np.where(hot, 0, np.minimum(self.step[mine] + watched, last))
        self.step[mine] = step
        done = hot | watched
        for each in (self.out, self.back):
            each[mine] = np.where(done, 0, each[mine])
        self.asked[mine] = np.where(done, np.nan, asked)
        ready = np.maximum(0, resident - np.ceil(self.resting[mine]).astype(np.int64))
        ready[(now < self.rest_until[mine]) | np.isfinite(self.asked[mine])] = 0
        begun = (step == 0) & (ready > 0)
        self.offered[mine] = np.where(begun, ready, self.offered[mine])
        self.tried[mine] = np.where(begun, 0, self.tried[mine])
        of_stable = np.array(SHARES)[np.minimum(step, len(SHARES) - 1)]
        shares: NDArray[np.float64] = np.where(paged_out, of_stable, np.array(COPIES_SHARES)[step])
        return np.minimum(ready, np.ceil(ready * shares).astype(np.int64))

    def total(self, state: ReclaimState, values: NDArray[np.int64]) -> int:
        """Of one state."""
        return int(values[self.state == _PLACE[state]].sum())


@dataclass
class Guest:
    """One VM.

    :ivar available: what it says it has available; None: what its pages leave.
    """

    name: str
    groups: list[Group]
    memory: int = 512 * MiB
    seed: int = 0
    condition: Condition = Condition.RUNNING
    connected: bool = True
    psi: float = 0.0
    available: int | None = None
    balloon: int | None = None
    ballooned: int = 0
    now: float = 0.0
    refaults: int = 0
    cpu_s: float = 0.0
    scans: int = 0
    scanned: float = -math.inf
    first_scan: float = math.inf
    epoch: Epoch | None = None
    ended: float = 0.0
    silent: bool = False

    def __post_init__(self) -> None:
        self.ram = Regions(self.groups, self.seed)

    @property
    def backing(self) -> int:
        return int((self.ram.pages - self.ram.gone).sum()) << PAGE_SHIFT

    @property
    def store(self) -> int:
        return int(self.ram.total(STABLE, self.ram.gone) * PAGE_SIZE * STORED)

    @property
    def active(self) -> int:
        """Pages that are accessed at least once in two minutes: the working set by another measure."""
        return int(self.ram.pages[self.ram.rate >= 0.5].sum())

    def uses(self, group: int, rate: float) -> None:
        """From now on the pages of a group (its place in ``groups``) are accessed so many times a minute."""
        self.ram.rate[self.ram.group == group] = rate

    def until(self, now: float) -> None:
        """Let the guest run."""
        seconds, self.now = now - self.now, now
        if self.condition is Condition.RUNNING:
            back = self.ram.run(seconds)
            self.refaults += back
            self.cpu_s += back * 10e-6

    def scan(self) -> None:
        """The guest reports."""
        self.scans += 1
        self.first_scan = min(self.first_scan, self.now)
        self.scanned = self.now

    def run(self, step: Step) -> int:
        """An epoch; pages discarded."""
        self.scan()
        confirmed = UNUSED in step.states and self.now - self.first_scan >= 10
        self.scans += 2 * confirmed
        left, gone, later = step.pages, dict.fromkeys(ReclaimState, 0), 0
        for state in step.states:
            if state is not UNUSED or confirmed or not step.sampled:
                gone[state], over = self.ram.take(state, left, self.now, sampled=step.sampled)
                left -= gone[state]
                later += over if state is not UNUSED else 0
        self.cpu_s += 0.02 + 2e-6 * sum(gone.values())
        self.epoch = Epoch(
            number=self.epoch.number + 1 if self.epoch else 1,
            age_s=0.0,
            candidates=sum(gone.values()),
            discarded_zero=gone[UNUSED],
            discarded_layer=gone[VOLATILE] + gone[POTENTIAL],
            discarded_store=gone[STABLE],
            later=later,
            scan_s=0.043 * self.memory / (512 * MiB),
            total_s=0.3,
        )
        self.ended = self.now
        return sum(gone.values())

    def sample(self) -> VmSample:
        """One look."""
        found = {state: self.ram.total(state, self.ram.pages) for state in ReclaimState}
        gone = {state: self.ram.total(state, self.ram.gone) for state in ReclaimState}
        known = ~np.isnan(self.ram.used)
        left = np.maximum(0, self.ram.offered[known] - self.ram.tried[known])
        available = self.available
        if available is None:
            available = (found[UNUSED] + found[VOLATILE]) << PAGE_SHIFT
        return VmSample(
            name=self.name,
            at_s=self.now,
            condition=self.condition,
            guest_connected=self.connected,
            memory_bytes=self.memory,
            backing_bytes=self.backing,
            store_bytes=self.store,
            zero_pages=gone[UNUSED],
            layer_pages=gone[VOLATILE] + gone[POTENTIAL],
            preserved_pages=gone[STABLE],
            refaults=Refaults(layer=self.refaults),
            filled_pages=self.refaults,
            pager_cpu_s=self.cpu_s,
            report=None
            if math.isinf(self.scanned)
            else Report(self.now - self.scanned, found[UNUSED], found[VOLATILE], found[POTENTIAL], found[STABLE]),
            cold_pages=int((left * (1 - self.ram.used[known])).sum()),
            epoch=None if self.epoch is None else replace(self.epoch, age_s=self.now - self.ended),
            guest=GuestWord(0.0, self.memory, available, self.psi, 0.0, 0) if self.connected else None,
            balloon_bytes=self.balloon,
            ballooned_bytes=self.ballooned,
        )


@dataclass
class Host:
    """A host that has ``total`` bytes, of which others use ``others``."""

    total: int
    others: int = 0
    psi: float = 0.0

    def sample(self, guests: Sequence[Guest], now: float) -> HostSample:
        """One look."""
        held = sum(guest.backing + guest.store for guest in guests)
        return HostSample(now, self.total, max(0, self.total - self.others - held), self.psi, 0.0)


@dataclass(frozen=True)
class Moment:
    """One look and what came of it; deciding took ``cpu_s``."""

    now: float
    cpu_s: float
    look: Look
    decisions: Decisions
    memory: PolicyMemory


def play(
    guests: Sequence[Guest],
    limits: Limits,
    seconds: float,
    host: Host | None = None,
    each: Callable[[float], None] | None = None,
    memory: PolicyMemory | None = None,
    every: float = 0.0,
) -> Iterator[Moment]:
    """Looks and decisions for a while, each carried out before the next.

    :param each: called before each look, to change guests or host.
    :param every: seconds that looks are apart at least.
    """
    memory = memory or PolicyMemory()
    by_name = {guest.name: guest for guest in guests}
    now = max((guest.now for guest in guests), default=0.0)
    until = now + seconds
    while now < until:
        if each is not None:
            each(now)
        for guest in guests:
            guest.until(now)
        look = Look(
            host.sample(guests, now) if host else None,
            tuple(guest.sample() for guest in guests if not guest.silent),
            tuple(guest.name for guest in guests if guest.silent),
            sum(guest.backing + guest.store for guest in guests if guest.silent),
        )
        began = time.process_time()
        memory, decisions = decide(memory, look, limits, now)
        yield Moment(now, time.process_time() - began, look, decisions, memory)
        for scan in decisions.scans:
            by_name[scan.vm].scan()
        for step in decisions.steps:
            by_name[step.vm].run(step)
        for each_balloon in decisions.balloons:
            _inflate(by_name[each_balloon.vm], each_balloon)
        now += max(every, decisions.look_again_s)


def _inflate(guest: Guest, balloon: Balloon) -> None:
    """What it gives up is not touched again while the balloon holds it: free pages first, then its cache."""
    change = ((guest.balloon or guest.memory) - balloon.guest_bytes) >> PAGE_SHIFT
    guest.balloon, guest.ballooned = balloon.guest_bytes, balloon.taken_bytes
    ram = guest.ram
    for state in (UNUSED, *_CONTENT):
        for place in np.flatnonzero((ram.state == _PLACE[state]) & (ram.gone < ram.pages)):
            pages = min(max(0, change), int(ram.pages[place] - ram.gone[place]))
            ram.gone[place] += pages
            change -= pages


def typical(name: str, seed: int = 0, memory: int = 512 * MiB, busy: float = 1.0) -> Guest:
    """A guest after reading much of its disk: a quarter free, half cache, of which a part is in use, the rest its own.

    :param busy: how much of its cache is in use, as a multiple of the usual.
    """
    pages = memory >> PAGE_SHIFT
    hot = min(0.45, 0.08 * busy)
    groups = [
        Group(UNUSED, int(pages * 0.245), 0.0),
        Group(UNUSED, int(pages * 0.005), 0.02),
        Group(VOLATILE, int(pages * hot), 20.0),
        Group(VOLATILE, int(pages * 0.005), 0.05),
        Group(VOLATILE, int(pages * (0.5 - hot - 0.005)), 0.0),
        Group(POTENTIAL, int(pages * 0.02), 0.5),
        Group(STABLE, int(pages * 0.13), 10.0),
        Group(STABLE, int(pages * 0.10), 0.0),
    ]
    return Guest(name, groups, memory, seed, balloon=memory)


def phased() -> tuple[Guest, Callable[[float], None], list[float]]:
    """A guest with phases, what is to be called before each look, and when each phase ends, in seconds."""
    mib = MiB >> PAGE_SHIFT
    groups = [
        Group(UNUSED, 120 * mib, 0.0),
        Group(VOLATILE, 60 * mib, 20.0),
        Group(VOLATILE, 60 * mib, 0.0),
        Group(VOLATILE, 120 * mib, 0.0),
        Group(STABLE, 100 * mib, 10.0),
        Group(STABLE, 52 * mib, 0.0),
    ]
    guest = Guest("phased", groups, seed=5)
    # What of the page cache is used: one part, then another, then everything for two minutes, then the first again.
    phases = [(90, (20.0, 0.0, 0.0)), (150, (0.0, 20.0, 0.0)), (152, (0.0, 20.0, 5.0)), (240, (20.0, 0.0, 0.0))]

    def change(now: float) -> None:
        rates = next((rates for until, rates in phases if now < until * 60), phases[-1][1])
        for group, rate in enumerate(rates, 1):
            guest.uses(group, rate)

    return guest, change, [until * 60.0 for until, _ in phases]
