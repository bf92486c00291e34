"""Making every discarded page resident, beside the faults that go on."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from hva_host.pager.epoch import Step
from hva_host.pager.ram import Ram
from hva_host.pager.refaults import Refaults
from hva_host.pager.streams import AROUND_MAX

_SLICE_RUNS = 16
#: Sweeps without progress before pages that only wait (for the disk, for memory) are left to their faults.
_IDLE_SWEEPS = 200


def restore(ram: Ram, refaults: Refaults) -> Iterator[Step]:
    """Fill every page that has a ledger entry; iterate until it ends. Held pages stay held.

    :raise PeerLost: QEMU is gone.
    """
    idle = 0
    while idle < _IDLE_SWEEPS:
        pfns = np.flatnonzero(ram.ledger.entries)
        pfns = pfns[~np.isin(pfns, list(refaults.held))]
        if not len(pfns):
            return
        filled = 0
        runs = 0
        position = -1
        for pfn in pfns.tolist():
            if pfn < position or not ram.ledger.entries[pfn]:
                continue
            count = refaults.fill(pfn, AROUND_MAX)
            filled += count
            position = pfn + max(count, 1)
            runs += 1
            if runs % _SLICE_RUNS == 0:
                yield Step.WORK
        idle = 0 if filled else idle + 1
        if not filled:
            yield Step.DISK
