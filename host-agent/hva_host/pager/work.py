"""The epoch or the restore under way: at most one, a step at a time between faults."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from hva_host.pager.epoch import Epoch, Step
from hvaqemu.errors import RefusedError

_CONFIRM_SECONDS = 0.002
_DISK_SECONDS = 0.005


class Work:
    """What the pager does when no fault waits.

    :ivar epoch: the epoch under way, if it is one.
    """

    def __init__(self) -> None:
        self.epoch: Epoch | None = None
        self._steps: Iterator[Step] | None = None
        self._finish: Callable[[], None] = lambda: None
        self._resume_at = 0.0

    def refuse_when_busy(self) -> None:
        """:raise RefusedError: something is under way."""
        if self._steps is not None:
            raise RefusedError("the pager is still at an epoch or a restore", "wait for it to end")

    def begin(self, steps: Iterator[Step], finish: Callable[[], None], epoch: Epoch | None = None) -> None:
        """Begin; ``finish`` is called at the end.

        :raise RefusedError: something is under way.
        """
        self.refuse_when_busy()
        self._steps, self._finish, self.epoch, self._resume_at = steps, finish, epoch, 0.0

    def hurry(self) -> None:
        """What it waits for may have come."""
        self._resume_at = 0.0

    def leave(self, start: int, stop: int) -> None:
        """Something happened to pfns ``[start, stop)``; called before it is answered."""
        if self.epoch is not None:
            self.epoch.leave(start, stop)

    def wanted_at(self) -> float | None:
        """When :meth:`advance` is to be called next (monotonic seconds), None while there is nothing to do."""
        return None if self._steps is None else self._resume_at

    def advance(self) -> None:
        """One step, if it is time.

        :raise PeerLost: QEMU is gone.
        """
        now = time.monotonic()
        if self._steps is None or now < self._resume_at:
            return
        step = next(self._steps, None)
        if step is None:
            finish, self._finish = self._finish, lambda: None
            # Kept by nobody: an epoch has several bytes a page.
            self._steps = self.epoch = None
            finish()
        elif step is Step.CONFIRM:
            self._resume_at = now + _CONFIRM_SECONDS
        elif step is Step.DISK:
            self._resume_at = now + _DISK_SECONDS
