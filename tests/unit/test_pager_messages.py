"""The pager link's framing, its histogram, and what an epoch is asked to try."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hva_host.agent.members import in_turn, members
from hva_host.agent.model import StallStats
from hva_host.pager.membership import SWAP_CACHE, Member
from hva_host.pager.messages import HEADER_MAX, MessageDecoder, encode
from hva_host.pager.stalls import Stalls
from hvaqemu.errors import ProtocolError
from hvaqemu.pages import PageAttribute, PageState
from hvaqemu.reclaim_config import ReclaimState


@given(
    st.lists(st.tuples(st.dictionaries(st.text(max_size=5), st.integers()), st.binary(max_size=50))), st.integers(1, 40)
)
def test_messages_survive_any_cutting(messages: list[tuple[dict[str, int], bytes]], step: int) -> None:
    sent = [({**message, "x": 1}, payload) for message, payload in messages if "payload" not in message]
    wire = b"".join(encode(message, payload) for message, payload in sent)
    decoder = MessageDecoder()
    got = [found for start in range(0, len(wire), step) for found in decoder.feed(wire[start : start + step])]
    assert got == sent


@pytest.mark.parametrize(
    "wire",
    [
        b"no json\n",
        b"[1]\n",
        b'{"payload": -1}\n',
        b'{"payload": 99999999999}\n',
        b'{"payload": "5"}\n',
        b"x" * (HEADER_MAX + 1),
    ],
)
def test_nonsense_ends_the_link(wire: bytes) -> None:
    with pytest.raises(ProtocolError):
        MessageDecoder().feed(wire)


@given(st.lists(st.floats(1e-6, 100), min_size=1))
def test_quantiles_are_right_to_a_tenth(waits: list[float]) -> None:
    stalls = Stalls()
    for wait in waits:
        stalls.add(wait)
    exact = sorted(waits)[max(0, -(-len(waits) // 2) - 1)]
    assert exact * 0.99 <= stalls.quantile(0.5) <= exact * 1.1
    assert stalls.longest == max(waits)
    assert Stalls().quantile(0.99) == 0.0


@given(st.lists(st.floats(1e-6, 100), min_size=1))
def test_every_wait_is_in_its_factor_of_two(waits: list[float]) -> None:
    stalls = Stalls()
    for wait in waits:
        stalls.add(wait)
    buckets = StallStats(**stalls.as_dict()).buckets
    assert sum(bucket.count for bucket in buckets) == len(waits)
    for bucket in buckets:
        # On the border, rounding decides.
        inside = [wait for wait in waits if bucket.upper_s * 0.5 * 0.999 <= wait <= bucket.upper_s * 1.001]
        assert 0 < bucket.count <= len(inside)
    assert StallStats(**Stalls().as_dict()).buckets == []


def test_members_follow_the_states_asked_for() -> None:
    swapcache = PageState.VOLATILE | PageAttribute.SWAPCACHE | PageAttribute.REFERENCED
    report = np.array(
        [PageState.STABLE, PageState.UNUSED, PageState.VOLATILE, PageState.POTENTIAL, swapcache], dtype=np.uint8
    )
    both = (ReclaimState.UNUSED, ReclaimState.VOLATILE)
    assert members(report, 5, both, sift=True).tolist() == [
        Member.SIFT,
        Member.UNUSED,
        Member.COPY,
        0,
        Member.COPY | SWAP_CACHE,
    ]
    assert members(report, 5, both[:1], sift=False).tolist() == [0, Member.UNUSED, 0, 0, 0]
    potential = (ReclaimState.POTENTIAL,)
    assert members(report, 5, potential, sift=False).tolist() == [0, 0, 0, Member.COPY, 0]
    assert members(None, 3, potential, sift=True).tolist() == [0] * 3
    assert members(None, 3, both, sift=True).tolist() == [Member.COPY] * 3
    assert members(None, 3, both[:1], sift=True).tolist() == [0] * 3


def test_potential_pages_come_after_volatile_ones() -> None:
    unused, volatile, potential = ReclaimState.UNUSED, ReclaimState.VOLATILE, ReclaimState.POTENTIAL
    every = (unused, potential, volatile)
    assert in_turn(every, 0, 32) == (unused, volatile)
    assert in_turn(every, 1, 32) == in_turn(every, 31, 32) == every
    # Nothing to come after.
    assert in_turn(every, 0, 1) == every
    assert in_turn((potential,), 0, 32) == (potential,)
    assert in_turn((unused, volatile), 0, 32) == (unused, volatile)
