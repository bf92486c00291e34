"""What an epoch is to try, from the guest's report and the states asked for."""

from __future__ import annotations

import numpy as np
import pytest

from hva_host.agent.members import members
from hva_host.pager.membership import Member
from hvaqemu.pages import PageAttribute, PageState
from hvaqemu.reclaim_config import ReclaimState

REPORT = np.array([PageState.STABLE, PageState.UNUSED, PageState.VOLATILE | PageAttribute.REFERENCED], dtype=np.uint8)
UNUSED, VOLATILE, STABLE = ReclaimState.UNUSED, ReclaimState.VOLATILE, ReclaimState.STABLE


@pytest.mark.parametrize(
    ("states", "sift", "expected"),
    [
        ((UNUSED, VOLATILE), True, [Member.SIFT, Member.UNUSED, Member.COPY]),
        ((UNUSED, VOLATILE), False, [Member.OUT, Member.UNUSED, Member.COPY]),
        ((UNUSED,), False, [Member.OUT, Member.UNUSED, Member.OUT]),
        ((UNUSED, VOLATILE, STABLE), True, [Member.STABLE, Member.UNUSED, Member.COPY_OR_STABLE]),
        # A free page that must not be taken as free is no page to be kept in a store either.
        ((VOLATILE, STABLE), False, [Member.STABLE, Member.OUT, Member.COPY_OR_STABLE]),
        ((STABLE,), False, [Member.STABLE, Member.OUT, Member.STABLE]),
    ],
)
def test_of_a_report(states: tuple[ReclaimState, ...], sift: bool, expected: list[Member]) -> None:
    assert members(REPORT, 3, states, sift=sift).tolist() == expected


@pytest.mark.parametrize(
    ("states", "expected"),
    [
        ((UNUSED,), Member.OUT),
        ((UNUSED, VOLATILE), Member.COPY),
        ((STABLE,), Member.STABLE),
        ((UNUSED, VOLATILE, STABLE), Member.COPY_OR_STABLE),
    ],
)
def test_of_a_guest_that_never_reported(states: tuple[ReclaimState, ...], expected: Member) -> None:
    assert members(None, 3, states, sift=True).tolist() == [expected] * 3
