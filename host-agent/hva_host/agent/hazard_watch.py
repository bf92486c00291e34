"""Keeps an eye on what makes discarding unsafe, also while nobody reclaims: what is plugged in is loud at once."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from contextlib import suppress

from hva_host.agent import hazards
from hva_host.agent.refusals import Refusals, Source
from hvaqemu.errors import HvaError, PeerLost
from hvaqemu.qemu.events import DeviceDeleted, OtherEvent, QmpEvent, Resume, Stop
from hvaqemu.qemu.process import QemuProcess
from hvaqemu.qemu.qmp import QmpLink

#: QEMU tells of devices that went, not of those that came.
_EVERY_SECONDS = 2.0
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

    def on_qmp_event(self, event: QmpEvent) -> None:
        """To be called with every event of QEMU's."""
        told = isinstance(event, OtherEvent) and event.name.startswith(_TELLING)
        if told or isinstance(event, DeviceDeleted | Stop | Resume):
            self._poked.set()

    async def look(self, *, deep: bool = False) -> None:
        """Ask QEMU now, and let :class:`Refusals` know; ``deep`` looks below devices, and at other processes.

        :raise HvaError: QEMU went, or did not answer; what was known stays.
        """
        if not self._qmp.connected:
            raise PeerLost("QMP: not connected")
        self._refusals.set(Source.QEMU, await hazards.of_qemu(self._qmp, deep=deep, direct=self._direct))
        if deep:
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
            self._poked.clear()
            # Told of in time by whoever asks for an epoch.
            with suppress(HvaError):
                await self.look(deep=True)
            with suppress(TimeoutError):
                async with asyncio.timeout(_EVERY_SECONDS):
                    await self._poked.wait()
