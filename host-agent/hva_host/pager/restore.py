"""Making discarded pages resident, all of them or a layer's, beside the faults that go on."""

from __future__ import annotations

from collections.abc import Collection, Iterator

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


def restore(ram: Ram, refaults: Refaults, fetcher: Fetcher, slots: Collection[int] | None = None) -> Iterator[Step]:
    """Fill every page that has a ledger entry; iterate until it ends. What can not be served stays as it is.

    :param slots: only pages that depend on these layers.
    :raise PeerLost: QEMU is gone.
    """
    refaults.unserved.clear()
    pfns = ram.ledger.dependants(slots)
    patience, left = _PATIENCE, len(pfns)
    while patience and left and len(refaults.unserved) < UNSERVED_MAX:
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
        pfns = ram.ledger.dependants(slots)
        before, left = left, len(pfns)
        patience = _PATIENCE if left < before else patience - 1
        yield Step.DISK
