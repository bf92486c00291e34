"""The user of a soak: reclaims all the time, sometimes restores or runs something, whoever dies meanwhile."""

from __future__ import annotations

import asyncio
import random
from collections import Counter

from hva_host.agent.client import AgentFailed, ControlClient
from hvaqemu.errors import HvaError
from tests.vm.host import Host

_STATES = ("unused", "volatile")
#: How long a user waits before the next command after one that failed, in seconds at the most. Meanwhile there may be
#: no host agent.
_AFTER_FAILURE = 0.5
_COMMANDS = {"reclaim": 80, "epoch": 10, "exec": 6, "status": 3, "restore": 1}
_COMMAND_SECONDS = 10.0
#: Seconds between two commands at the most. Without, an emulated guest does little else than bring pages back.
_BETWEEN = 0.2


class User:
    """Gives commands through the control socket; starts a host agent where there is none, as every command does.

    :ivar done: commands that succeeded, by name.
    :ivar errors: what failed commands said, and how often.
    :ivar bugs: what no death explains.
    """

    def __init__(self, host: Host, name: str, seed: int) -> None:
        self._host = host
        self._name = name
        self._rng = random.Random(seed)
        self.done: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()
        self.bugs: list[str] = []

    async def work(self) -> None:
        """Until cancelled, or until a bug was met."""
        while not self.bugs:
            try:
                async with self._host.client() as client:
                    while True:
                        await self._command(client)
            except AgentFailed as error:
                self.bugs.append(f"host agent: {error}")
            except HvaError as error:
                self.errors[error.message] += 1
                await asyncio.sleep(self._rng.uniform(0.0, _AFTER_FAILURE))

    async def _command(self, client: ControlClient) -> None:
        command = self._rng.choices(list(_COMMANDS), list(_COMMANDS.values()))[0]
        if command in ("reclaim", "epoch"):
            await client.reclaim(self._name, _STATES, 1 if command == "epoch" else None, lambda _stats: None)
        elif command == "exec":
            await client.run(self._name, ["true"], _COMMAND_SECONDS)
        elif command == "status":
            await client.status(self._name)
        else:
            await client.restore(self._name)
        self.done[command] += 1
        await asyncio.sleep(self._rng.uniform(0.0, _BETWEEN))
