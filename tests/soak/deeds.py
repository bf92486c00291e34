"""What a soak does to whom and when: reproducible from a seed. Arithmetic only."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum


class Target(StrEnum):
    """Who is to die."""

    PAGER = "pager"
    #: Pagers are forked from it; the host agent starts another when it needs one.
    PAGER_PARENT = "pagers' parent"
    HOST_AGENT = "host agent"
    GUEST_AGENT = "guest agent"


class How(StrEnum):
    """What happens to it."""

    KILL = "killed"
    STOP_KILL = "stopped, then killed"
    STOP_CONT = "stopped, then continued"
    #: As soon as one appears in its place, that one is killed too, a moment later.
    TWICE = "killed, and its successor while it starts"


@dataclass(frozen=True)
class Deed:
    """One deed. Times are seconds.

    :ivar targets: one, or two at once.
    :ivar pause: how long everything is left alone before.
    :ivar gap: between the two signals of a deed that has two.
    """

    targets: tuple[Target, ...]
    how: How
    pause: float
    gap: float = 0.0

    @property
    def kind(self) -> str:
        """What deeds are counted by."""
        return f"{' and '.join(self.targets)} {self.how}"


_TARGETS = {
    (Target.PAGER,): 9,
    (Target.HOST_AGENT,): 5,
    (Target.GUEST_AGENT,): 6,
    (Target.PAGER, Target.HOST_AGENT): 2,
    (Target.PAGER, Target.GUEST_AGENT): 1,
    (Target.HOST_AGENT, Target.GUEST_AGENT): 1,
    (Target.PAGER_PARENT,): 1,
    (Target.PAGER, Target.PAGER_PARENT): 2,
}
_HOWS = {How.KILL: 7, How.STOP_KILL: 1, How.STOP_CONT: 1, How.TWICE: 2}
#: Most deeds come a few hundred milliseconds apart; now and then all have time to get into their stride.
_PAUSE = (0.1, 1.1)
_REST = (3.0, 8.0)
_REST_SHARE = 0.15
_STOPPED = (0.02, 1.5)
#: From the moment a successor is there to its death. A pager is seen once it holds the ledger, and attaches within
#: milliseconds; a host agent is seen at once, and takes a second until it has adopted everything.
_PAGER_STARTS = (0.0, 0.03)
_HOST_AGENT_STARTS = (0.0, 1.0)


def deeds(seed: int) -> Iterator[Deed]:
    """The deeds of this seed, without end."""
    rng = random.Random(seed)
    while True:
        targets = rng.choices(list(_TARGETS), list(_TARGETS.values()))[0]
        how = rng.choices(list(_HOWS), list(_HOWS.values()))[0]
        if how is How.TWICE and not {Target.PAGER, Target.HOST_AGENT}.intersection(targets):
            # The others' successors come when they are needed, or a second later.
            how = How.KILL
        pause = rng.uniform(*_REST if rng.random() < _REST_SHARE else _PAUSE)
        gap = 0.0
        if how is How.TWICE:
            gap = rng.uniform(*_HOST_AGENT_STARTS if Target.HOST_AGENT in targets else _PAGER_STARTS)
        elif how is not How.KILL:
            gap = rng.uniform(*_STOPPED)
        yield Deed(targets, how, pause, gap)
