"""Samples a VM while a scenario plays; holds a bounded number of points however long that takes."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress

from hva_host.agent.model import Sample
from hva_host.scenario.seam import PlayedVm
from hvaqemu.errors import HvaError
from hvaqemu.qemu.race import race

#: Seconds between samples at first.
INTERVAL = 0.15
#: Samples held; beyond it every second one goes and the interval doubles.
MOST = 2048
#: Seconds a sample may take; a VM that answers slower leaves a gap.
DEADLINE = 5.0


class Timeline:
    """The samples, at about even distances."""

    def __init__(self, most: int = MOST, interval: float = INTERVAL) -> None:
        """:param most: samples held, even; :param interval: seconds between them at first."""
        self.samples: list[Sample] = []
        self.interval = interval
        self._most = most

    def add(self, sample: Sample) -> None:
        """Take a point in, thinning out where there are too many."""
        self.samples.append(sample)
        if len(self.samples) > self._most:
            # The newest stays, whatever the parity: a picture must not end early.
            self.samples = self.samples[:-1:2] + self.samples[-1:]
            self.interval *= 2

    async def follow(self, vm: PlayedVm) -> None:
        """Sample until cancelled, or until the VM can not go on."""
        while not vm.failure.done():
            begin = time.monotonic()
            # A gap in a picture is no reason to end a run.
            with suppress(HvaError):
                self.add(await race(vm.sample(), DEADLINE, "sampling", vm.failure))
            spent = time.monotonic() - begin
            await asyncio.sleep(max(self.interval - spent, self.interval / 4))
