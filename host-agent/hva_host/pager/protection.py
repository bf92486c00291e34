"""Write protection of an epoch's members, in slices of about a millisecond."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from hva_host.pager.membership import Membership
from hva_host.pager.ram import Ram
from hvaqemu.faultpoints import reach
from hvaqemu.pages import Run

#: How long a step may go on before faults are looked at again, in seconds.
_SLICE_SECONDS = 0.001


class Protection:
    """The protected runs of one epoch."""

    def __init__(self, ram: Ram, members: Membership, stop: int) -> None:
        """:param stop: the first pfn behind the epoch's part of RAM."""
        self._ram = ram
        self._members = members
        self._stop = stop
        self._runs: list[Run] = []

    def protect(self, late: Callable[[], bool]) -> Iterator[None]:
        """Protect all members, and take out those that were not present after it; gives way now and then.

        :param late: asked between slices; True: what is not protected yet is taken out instead.
        :raise PeerLost: QEMU is gone.
        :raise OSError: the host has no memory for page tables.
        """
        until = time.monotonic() + _SLICE_SECONDS
        for run in self._members.runs():
            # Noted first: a protection that fails half-way has protected some of the run.
            self._runs.append(run)
            self._ram.protect(run)
            reach("pager.epoch.protecting")
            if time.monotonic() > until:
                yield
                until = time.monotonic() + _SLICE_SECONDS
                if late():
                    # What is not protected must not be proven.
                    self._members.take_out(run.stop, self._stop)
                    break
        yield from self._drop_absent()

    def _drop_absent(self) -> Iterator[None]:
        """Only what is present now, after protecting, stays: what comes later was filled by a fault, and so left."""
        if not self._runs:
            return
        position, stop = self._runs[0].start, self._runs[-1].stop
        until = time.monotonic() + _SLICE_SECONDS
        for run in self._ram.backing.present_runs(position, stop):
            self._members.take_out(position, run.start)
            position = run.stop
            if time.monotonic() > until:
                yield
                until = time.monotonic() + _SLICE_SECONDS
        self._members.take_out(position, stop)

    def unprotect(self) -> Iterator[None]:
        """Let writes through to all that was protected; gives way now and then.

        :raise PeerLost: QEMU is gone.
        """
        until = time.monotonic() + _SLICE_SECONDS
        for run in self._runs:
            self._ram.unprotect(run)
            reach("pager.epoch.unprotecting")
            if time.monotonic() > until:
                yield
                until = time.monotonic() + _SLICE_SECONDS
