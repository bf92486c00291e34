"""What a pager says of held pages, and what becomes of its VM: stopped and shown as HELD, tried again, let go on."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from hva_host.agent.chores import Chores
from hva_host.agent.condition import Condition, Listener
from hva_host.agent.hold import Hold
from hva_host.agent.model import HeldPages
from hva_host.agent.pager_process import PagerHandle, call
from hvaqemu.errors import HvaError, PeerLost
from hvaqemu.qemu.qmp import QmpLink

#: The pager itself gives the disk some seconds to bring what it needs to try.
_RESUME_SECONDS = 15.0


class Holding:
    """One VM's.

    :param hold: the state this keeps.
    :param condition: told when it changes.
    :param tell: told when pages are held or released.
    """

    def __init__(
        self,
        name: str,
        pager: PagerHandle,
        qmp: QmpLink,
        hold: Hold,
        condition: Condition,
        chores: Chores,
        tell: Listener,
    ) -> None:
        self._name = name
        self._pager = pager
        self._qmp = qmp
        self._hold = hold
        self._condition = condition
        self._chores = chores
        self._tell = tell
        self._heard = 0

    def on_event(self, data: Mapping[str, Any]) -> None:
        """The pager said unasked what is held now."""
        self._heard += 1
        self._learn(data["held"])

    async def ask(self) -> dict[str, Any]:
        """The pager's status; what it says of held pages is learned.

        :raise HvaError: it does not answer.
        """
        heard = self._heard
        status = await call(self._pager, "status")
        # An event that came after the answer, and before we could go on, is newer.
        if heard == self._heard:
            self._learn(status["held"])
        return status

    async def learn(self) -> None:
        """Ask a pager what is held that said so while nobody listened."""
        with suppress(HvaError):
            await self.ask()

    async def resume(self) -> int:
        """Try held pages again; how many are still held.

        :raise HvaError: the pager went or was silent, or the guest could not be told to go on.
        """
        try:
            await call(self._pager, "resume", _RESUME_SECONDS)
        except PeerLost as error:
            if not self._hold.active:
                raise
            raise PeerLost(f"VM {self._name} is HELD: {self._hold.reason}", "one is tried again and again") from error
        await self.ask()
        await self._chores.settled()
        if not self._hold.pages:
            await self._hold.released(self._qmp)
        return sum(len(held.pages) for held in self._hold.pages)

    def pager_failed(self, error: Exception) -> None:
        """Nobody answers faults, and no pager could be started for a while."""
        self._hold.without_pager(str(error))
        self._condition.hold_changed()

    def pager_back(self) -> None:
        """A pager serves again."""
        self._hold.without_pager("")
        self._condition.hold_changed()
        self._chores.begin("learn what is held", self.learn())

    def _learn(self, held: list[dict[str, Any]]) -> None:
        pages = tuple(HeldPages(**entry) for entry in held)
        if pages == self._hold.pages:
            return
        if pages:
            self._hold.begin(pages, self._qmp)
            self._tell("VM_HELD", {"name": self._name, "held": held})
        else:
            self._hold.end()
            self._chores.begin("let the guest go on", self._hold.let_go(self._qmp))
            self._tell("VM_RELEASED", {"name": self._name})
        self._condition.hold_changed()
