"""How much of one guest is listened to. Arithmetic only; the clock is the caller's.

A guest can write faster than Python can read, and every VM of a host is served by one event loop. So what is read of
one guest is paid for, in bytes and in steps of work, from allowances that fill again at a fixed rate; in debt, nothing
is read. What the guest goes on to write then waits in the socket, then in QEMU, then in the guest itself.

The rates, against what an honest guest says at most:

- A scan of 16 GiB is 128 pieces, of which each is 1 KiB, or 33 KiB if nothing of it compresses; an epoch is three of
  them, one of bytes and two of bits: at most 5 MiB and, if every piece is read by itself, 3,500 steps. Full allowances
  hold two epochs, and fill faster than an emulated guest scans (85 pieces, 770 steps a second).
- A command's output comes in pieces of up to 32 KiB. All that is kept of one unless the caller asks for more (4 MiB)
  fits the full allowance. A command that writes small pieces faster than this waits, and its next piece is larger.

And against the host: a byte costs about 2 ns beside its step, a step 2 to 25 µs, so a guest that does nothing but write
takes 3 to 12 % of one core (``python -m benchmarks liars``).
"""

from __future__ import annotations

#: Bytes a second, and at once after a pause.
BYTES_RATE, BYTES_BURST = 16 << 20, 32 << 20
#: Steps a second, and at once after a pause.
STEPS_RATE, STEPS_BURST = 4000, 8000
#: A step is one header looked at. Waking up to read anything at all, and a HELLO with its fields and what it does to
#: the session, are worth this many.
READ_STEPS, HELLO_STEPS = 8, 8


class TokenBucket:
    """An allowance that fills at ``rate`` a second up to ``burst``, and may be overdrawn."""

    def __init__(self, rate: float, burst: float) -> None:
        self._rate = rate
        self._burst = burst
        self._tokens = burst
        self._at: float | None = None

    def take(self, amount: float, now: float) -> float:
        """Spend ``amount``; seconds until the debt is paid, 0.0 if there is none.

        :param now: seconds, on a clock that does not go back.
        """
        if self._at is not None:
            self._tokens = min(self._burst, self._tokens + (now - self._at) * self._rate)
        self._at = now
        self._tokens -= amount
        return max(0.0, -self._tokens / self._rate)


class ReadBudget:
    """What may be read of one guest; it outlives connections, so that reconnecting gains nothing."""

    def __init__(self) -> None:
        self._bytes = TokenBucket(BYTES_RATE, BYTES_BURST)
        self._steps = TokenBucket(STEPS_RATE, STEPS_BURST)

    def charge(self, count: int, steps: int, now: float) -> float:
        """Pay for ``count`` bytes that took ``steps``; seconds for which nothing may be read."""
        return max(self._bytes.take(count, now), self._steps.take(steps, now))
