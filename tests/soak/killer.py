"""Carries deeds out on real processes, and counts the signals that met somebody."""

from __future__ import annotations

import asyncio
import signal
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable

from tests.soak.deeds import Deed, How, Target
from tests.vm.board import Board
from tests.vm.host import Host

#: How long a successor is waited for, in seconds, and how often it is looked for meanwhile.
_SUCCESSOR_SECONDS = 3.0
_LOOK_SECONDS = 0.001


class Killer:
    """Does deeds to the pager, the host agent and the guest agent of one VM.

    :ivar kills: SIGKILLs that met a process, by who it was.
    :ivar done: each deed's monotonic time and kind.
    """

    def __init__(self, host: Host, board: Board) -> None:
        self._host = host
        self._board = board
        self._find: dict[Target, Callable[[], list[int]]] = {
            Target.PAGER: host.pagers,
            Target.PAGER_PARENT: host.pager_parents,
            Target.HOST_AGENT: host.agents,
        }
        self.kills: Counter[Target] = Counter()
        self.done: list[tuple[float, str]] = []

    async def work(self, deeds: Iterable[Deed], going: Callable[[], bool]) -> None:
        """Do deeds while ``going()`` says so, which is asked before each."""
        for deed in deeds:
            await asyncio.sleep(deed.pause)
            if not going():
                return
            await self.do(deed)

    async def do(self, deed: Deed) -> None:
        """Do one deed."""
        # At once means both have their signal before either's death could be noticed.
        there = {target: self._pids(target) for target in deed.targets}
        if not any(there.values()):
            return
        self.done.append((time.monotonic(), deed.kind))
        first = signal.SIGSTOP if deed.how in (How.STOP_KILL, How.STOP_CONT) else signal.SIGKILL
        for target, pids in there.items():
            self._signal(target, pids, first)
        if deed.how is How.TWICE:
            twice = [target for target in there if target in (Target.PAGER, Target.HOST_AGENT)]
            await asyncio.gather(*(self._kill_successor(target, there[target], deed.gap) for target in twice))
        elif first is signal.SIGSTOP:
            await asyncio.sleep(deed.gap)
            last = signal.SIGKILL if deed.how is How.STOP_KILL else signal.SIGCONT
            for target, pids in there.items():
                self._signal(target, pids, last)

    async def _kill_successor(self, target: Target, killed: Collection[int], gap: float) -> None:
        until = time.monotonic() + _SUCCESSOR_SECONDS
        while time.monotonic() < until:
            if found := [pid for pid in self._pids(target) if pid not in killed]:
                await asyncio.sleep(gap)
                self._signal(target, found, signal.SIGKILL)
                return
            await asyncio.sleep(_LOOK_SECONDS)

    def _pids(self, target: Target) -> list[int]:
        # The guest agent is found in the guest.
        return self._find[target]() if target in self._find else [0]

    def _signal(self, target: Target, pids: Collection[int], number: signal.Signals) -> None:
        if target is Target.GUEST_AGENT:
            self._board.order("signal", number)
            return
        met = sum(self._host.send(pid, number) for pid in pids)
        if number is signal.SIGKILL:
            self.kills[target] += met
