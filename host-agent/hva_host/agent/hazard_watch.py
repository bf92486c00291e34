"""Keeps an eye on what makes discarding unsafe, also while nobody reclaims: what is plugged in is loud at once."""

from __future__ import annotations

import asyncio
import math
import os
import time
from collections.abc import Collection
from contextlib import suppress

from hva_host.agent import hazards
from hva_host.agent.refusals import Refusals, Source
from hvaqemu.errors import HvaError, PeerLost
from hvaqemu.qemu.events import DeviceDeleted, OtherEvent, QmpEvent, Resume, Stop
from hvaqemu.qemu.process import QemuProcess
from hvaqemu.qemu.qmp import QmpLink

#: QEMU tells of devices that went, not of those that came. But whatever pins RAM, or hands it to others, has a
#: descriptor in QEMU (a device of the kernel's, a socket, a memfd): those are counted often, for a hundredth of what a
#: full look costs, and another number is followed by a full one. So is whatever was found, until it has gone. Once in a
#: while it is looked at what can be plugged in, and at other processes, in any case.
_EVERY_SECONDS = 2.0
_ANYHOW_SECONDS = 60.0
_TELLING = ("DEVICE_", "MIGRATION", "JOB_STATUS_CHANGE", "MEMORY_DEVICE_", "DUMP_COMPLETED", "BLOCK_JOB_")


class HazardWatch:
    """One VM's.

    :param direct: nodes that may do direct I/O: epochs are bracketed for them.
    """

    def __init__(self, refusals: Refusals, qmp: QmpLink, process: QemuProcess, direct: Collection[str] = ()) -> None:
        self._direct = direct
        self._refusals = refusals
        self._qmp = qmp
        self._process = process
        self._poked = asyncio.Event()
        self._descriptors = 0
        #: There may be something that no look has found yet.
        self._unseen = False
        self._looked_at = -math.inf

    def on_qmp_event(self, event: QmpEvent) -> None:
        """To be called with every event of QEMU's."""
        told = isinstance(event, OtherEvent) and event.name.startswith(_TELLING)
        if told or isinstance(event, DeviceDeleted | Stop | Resume):
            self._poked.set()

    async def look(self, *, deep: bool = False, processes: bool = False) -> None:
        """Ask QEMU now, and let :class:`Refusals` know.

        :param deep: look below devices, too.
        :param processes: look at other processes, too.
        :raise HvaError: QEMU went, or did not answer; what was known stays.
        """
        if not self._qmp.connected:
            raise PeerLost("QMP: not connected")
        self._refusals.set(Source.QEMU, await hazards.of_qemu(self._qmp, deep=deep, direct=self._direct))
        if processes:
            self._refusals.set(Source.PROCESS, await asyncio.to_thread(hazards.of_process, self._process.pid))

    async def check(self) -> None:
        """Look, and see that nothing was found, here or by anybody else.

        :raise RefusedError: something was.
        :raise HvaError: QEMU went, or did not answer.
        """
        # A reason somebody else holds is enough, and QEMU may be too busy with it to answer.
        self._refusals.check(Source.MONITOR, Source.LAYERS)
        await self.look()
        self._refusals.check()

    async def run(self) -> None:
        """Look every few seconds, and whenever QEMU tells of a change, until cancelled."""
        while True:
            # Told of in time by whoever asks for an epoch.
            with suppress(HvaError):
                self._unseen |= self._changed()
                if self._unseen or time.monotonic() - self._looked_at >= _ANYHOW_SECONDS:
                    await self.look(deep=self._unseen, processes=True)
                    self._looked_at, self._unseen = time.monotonic(), False
            with suppress(TimeoutError):
                async with asyncio.timeout(_EVERY_SECONDS):
                    await self._poked.wait()

    def _changed(self) -> bool:
        """Whether there may be something new, or something was found."""
        before = self._descriptors
        with suppress(OSError):
            # A path object for each of a hundred would cost more than all the rest.
            self._descriptors = len(os.listdir(f"/proc/{self._process.pid}/fd"))  # noqa: PTH208
        poked = self._poked.is_set()
        self._poked.clear()
        return poked or self._descriptors != before or bool(self._refusals.text)
