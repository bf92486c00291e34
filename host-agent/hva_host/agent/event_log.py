"""What happens to VMs, in the host agent's log. A guest can make some of it happen as often as it likes: then the log
says how often, not each time."""

from __future__ import annotations

import json
import logging
from typing import Any

from hva_host.agent.guest_budget import TokenBucket

log = logging.getLogger(__name__)

#: Lines a minute for one event of one VM, and at once after a pause.
_RATE, _BURST = 6.0, 30.0
#: Events of VMs that are remembered: more than a host has.
_KEYS_MAX = 4096
#: Epochs are counted, not told: with reclaim going on all the time there is no end of them.
_UNTOLD = frozenset({"EPOCH"})
#: What an operator should see among the rest; so are states that take one.
_LOUD = frozenset(
    {
        *("VM_HELD", "LAYER_WRITER", "LAYER_CHANGED", "RECLAIM_REFUSED", "PAGER_LOST", "PAGER_FAILED"),
        *("FREEZE_BUDGET", "FREEZE_FAILED"),
    }
)
_LOUD_STATES = frozenset({"held", "panicked"})


class _Account:
    """One event of one VM."""

    def __init__(self) -> None:
        self.bucket = TokenBucket(_RATE / 60, _BURST)
        self.until = 0.0
        self.untold = 0


class EventLog:
    """Writes events to the log, few of each kind."""

    def __init__(self) -> None:
        self._accounts: dict[tuple[str, str], _Account] = {}

    def write(self, event: str, data: dict[str, Any], now: float) -> None:
        """Log an event, or count it if there were many like it lately.

        :param now: seconds, on a clock that does not go back.
        """
        if event in _UNTOLD:
            return
        if len(self._accounts) >= _KEYS_MAX:
            self._accounts.clear()
        account = self._accounts.setdefault((event, str(data.get("name"))), _Account())
        if now < account.until:
            account.untold += 1
            return
        account.until = now + account.bucket.take(1, now)
        more = f" (and {account.untold} more before it)" if account.untold else ""
        account.untold = 0
        loud = event in _LOUD or data.get("state") in _LOUD_STATES
        log.log(logging.WARNING if loud else logging.INFO, "%s %s%s", event, json.dumps(data, default=str), more)
