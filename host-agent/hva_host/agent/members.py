"""What an epoch should try: from the guest's newest report and the states asked for. Arithmetic only."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from hva_host.pager.membership import SWAP_CACHE, Member
from hvaqemu.pages import STATE_MASK, PageAttribute, PageState
from hvaqemu.reclaim_config import ReclaimState


def members(
    class_map: NDArray[np.uint8] | None, pages: int, states: Collection[ReclaimState], *, sift: bool
) -> NDArray[np.uint8]:
    """:class:`Member` values for an epoch, swap-cache pages with :data:`SWAP_CACHE`; uint8, shape ``(pages,)``.

    :param class_map: the guest's newest report (state and attributes a byte), shape ``(pages,)``; None where the guest
        never reported: then every page may be a copy, and none is known to be free.
    :param sift: also look for zeros among the pages the guest wants kept.
    """
    wanted = np.full(pages, Member.OUT, dtype=np.uint8)
    stable = ReclaimState.STABLE in states
    if class_map is None:
        if ReclaimState.VOLATILE in states:
            wanted[:] = Member.COPY_OR_STABLE if stable else Member.COPY
        elif stable:
            wanted[:] = Member.STABLE
        return wanted
    found = class_map & STATE_MASK
    if stable:
        # Whatever holds content: a page of a file that no layer holds is as good as any other.
        wanted[found != PageState.UNUSED] = Member.STABLE
    elif sift:
        wanted[found == PageState.STABLE] = Member.SIFT
    if ReclaimState.UNUSED in states:
        wanted[found == PageState.UNUSED] = Member.UNUSED
    if ReclaimState.VOLATILE in states:
        wanted[found == PageState.VOLATILE] = Member.COPY_OR_STABLE if stable else Member.COPY
    if ReclaimState.POTENTIAL in states:
        wanted[found == PageState.POTENTIAL] = Member.COPY_OR_STABLE if stable else Member.COPY
    swapped = (found == PageState.VOLATILE) & (class_map & PageAttribute.SWAPCACHE != 0)
    wanted[swapped & (wanted != Member.OUT)] |= SWAP_CACHE
    return wanted


def in_turn(states: Sequence[ReclaimState], number: int, epochs: int) -> tuple[ReclaimState, ...]:
    """What the epoch ``number`` (from 0) of ``epochs`` takes of ``states``.

    POTENTIAL pages are those that are soonest written, so they come after VOLATILE: from the second epoch on. Where
    there is no second one, all come at once.
    """
    late = ReclaimState.VOLATILE in states and number == 0 and epochs > 1
    return tuple(state for state in states if not (late and state is ReclaimState.POTENTIAL))
