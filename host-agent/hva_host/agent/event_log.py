"""What happens to VMs, in the host agent's log. A guest can make some of it happen as often as it likes: then the log
says how often, not each time."""

from __future__ import annotations

import json
import logging
from typing import Any

from hva_host.agent.event_rates import EventRates
from hva_host.agent.events import is_loud

log = logging.getLogger(__name__)

#: Lines a minute for one event of one VM, and at once after a pause.
_RATE, _BURST = 6.0, 30.0
#: Epochs are counted, not told: with reclaim going on all the time there is no end of them.
_UNTOLD = frozenset({"EPOCH"})
#: States that take an operator.
_LOUD_STATES = frozenset({"held", "panicked"})


class EventLog:
    """Writes events to the log, few of each kind."""

    def __init__(self) -> None:
        self._rates = EventRates(_RATE / 60, _BURST)

    def write(self, event: str, data: dict[str, Any], now: float) -> None:
        """Log an event, or count it if there were many like it lately.

        :param now: seconds, on a clock that does not go back.
        """
        if event in _UNTOLD:
            return
        untold = self._rates.admit(event, str(data.get("name")), now)
        if untold is None:
            return
        more = f" (and {untold} more before it)" if untold else ""
        loud = is_loud(event) or data.get("state") in _LOUD_STATES or bool(data.get("error"))
        log.log(logging.WARNING if loud else logging.INFO, "%s %s%s", event, json.dumps(data, default=str), more)
