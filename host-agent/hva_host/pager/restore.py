"""Making every discarded page resident, beside the faults that go on."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from hva_host.pager.epoch import Step
from hva_host.pager.fetch import Fetcher
from hva_host.pager.ram import Ram
from hva_host.pager.refaults import UNSERVED_MAX, Refaults
from hva_host.pager.streams import AROUND_MAX
from hvaqemu.faultpoints import reach

_SLICE_RUNS = 16
#: Blocks of the disk asked for at a time, so that a fault's own is never far behind.
_FETCHES = 2
#: Waits of :data:`Step.DISK` without progress before pages that only wait are left to their faults: about a minute.
_PATIENCE = 12_000


def restore(ram: Ram, refaults: Refaults, fetcher: Fetcher) -> Iterator[Step]:
    """Fill every page that has a ledger entry; iterate until it ends. What can not be served stays as it is.

    :raise PeerLost: QEMU is gone.
    """
    refaults.unserved.clear()
    patience, left = _PATIENCE, sum(ram.ledger.totals().values())
    while patience and left and len(refaults.unserved) < UNSERVED_MAX:
        pfns = np.flatnonzero(ram.ledger.entries)
        pfns = pfns[~np.isin(pfns, [*refaults.held, *refaults.unserved])]
        if not len(pfns):
            return
        position = -1
        for runs, pfn in enumerate(pfns.tolist()):
            while fetcher.under_way >= _FETCHES:
                yield Step.DISK
            if pfn >= position and ram.ledger.words[pfn]:
                filled = refaults.fill(pfn, AROUND_MAX)
                if not filled:
                    # What is being fetched instead is passed over: it is asked for once a sweep.
                    filled = 1 if pfn in refaults.unserved else AROUND_MAX
                position = pfn + filled
                reach("pager.restore.filled")
            if runs % _SLICE_RUNS == 0:
                yield Step.WORK
        before, left = left, sum(ram.ledger.totals().values())
        patience = _PATIENCE if left < before else patience - 1
        yield Step.DISK
