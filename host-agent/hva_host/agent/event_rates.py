"""Few of each kind of event: a guest can make some of them happen as often as it likes."""

from __future__ import annotations

from hva_host.agent.guest_budget import TokenBucket

#: Events that are remembered: more than all VMs of a host have.
_KEYS_MAX = 4096


class _Account:
    def __init__(self, rate: float, burst: float) -> None:
        self.bucket = TokenBucket(rate, burst)
        self.until = 0.0
        self.untold = 0


class EventRates:
    """Says which events are told, of each kind of each VM ``burst`` at once and ``rate`` a second.

    :param rates: other rates, by kind.
    """

    def __init__(self, rate: float, burst: float, rates: dict[str, float] | None = None) -> None:
        self._rate = rate
        self._burst = burst
        self._rates = rates or {}
        self._accounts: dict[tuple[str, str], _Account] = {}

    def admit(self, event: str, name: str, now: float) -> int | None:
        """How many like it were not told since the last that was; None: this one is not told either.

        :param name: the VM's.
        :param now: seconds, on a clock that does not go back.
        """
        account = self._accounts.get((event, name))
        if account is None:
            if len(self._accounts) >= _KEYS_MAX:
                self._accounts.clear()
            account = self._accounts[event, name] = _Account(self._rates.get(event, self._rate), self._burst)
        if now < account.until:
            account.untold += 1
            return None
        account.until = now + account.bucket.take(1, now)
        untold, account.untold = account.untold, 0
        return untold
