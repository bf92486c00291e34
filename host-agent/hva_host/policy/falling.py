"""How fast memory goes, so that a step is begun before there is none left."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hva_host.policy.samples import HostSample

#: Of what was seen, what is this old counts 1/e: a guest that reads files takes memory in bursts.
_SMOOTH_SECONDS = 3.0
#: Looks further apart say nothing of what goes on now.
_APART_SECONDS = 15.0


@dataclass(frozen=True, slots=True)
class Falling:
    """What was left of some memory, bytes, and how fast it goes.

    :ivar of: the memory's size, which tells one from another.
    :ivar per_s: bytes a second; 0 where it grows.
    :ivar fell: the same between the last two looks alone.
    """

    of: int = 0
    at_s: float = -math.inf
    left: int = 0
    per_s: float = 0.0
    fell: float = 0.0

    def seen(self, of: int, at_s: float, left: int) -> Falling:
        """With one look more."""
        elapsed = at_s - self.at_s
        if of != self.of or elapsed > _APART_SECONDS:
            return Falling(of, at_s, left)
        if elapsed <= 0:
            return self
        weight = 1 - math.exp(-elapsed / _SMOOTH_SECONDS)
        fell = (self.left - left) / elapsed
        # Something large that was taken at once does not go on.
        believed = min(fell, self.fell)
        return Falling(of, at_s, left, max(0.0, self.per_s + weight * (believed - self.per_s)), fell)


@dataclass(frozen=True, slots=True)
class Falls:
    """Of what the host has available, and of what the VMs' control group has left."""

    available: Falling = Falling()
    group: Falling = Falling()

    def seen(self, host: HostSample) -> Falls:
        """With one look more."""
        group = Falling()
        if host.cgroup is not None:
            group = self.group.seen(host.cgroup.limit_bytes, host.at_s, host.cgroup.left_bytes)
        return Falls(self.available.seen(host.total_bytes, host.at_s, host.available_bytes), group)


#: Nothing was seen yet.
UNSEEN = Falls()
