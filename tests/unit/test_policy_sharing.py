"""From whom memory is taken."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from hva_host.policy.sharing import Holder, price, taken


def holder(name: str, shares: int = 100, held: int = 100_000, used: int = 50_000, spare: int = 100_000) -> Holder:
    return Holder(name, shares, held, used, spare)


def test_an_idle_page_costs_four_times_a_used_one() -> None:
    assert price(100, 1000, 1000) == 4 * price(100, 1000, 0)


def test_the_idle_give_before_the_busy() -> None:
    given_by = taken([holder("busy", used=100_000), holder("idle", used=0)], 20_000)
    assert given_by == {"idle": 20_000}


def test_the_idle_keep_something_all_the_same() -> None:
    """A tax of less than everything: at a quarter of the busy one's pages both pay alike."""
    given_by = taken([holder("busy", used=100_000), holder("idle", used=0)], 100_000)
    assert 16_000 < given_by["busy"] < 24_000
    assert 76_000 < given_by["idle"] < 84_000


def test_shares_are_a_claim() -> None:
    given_by = taken([holder("few", shares=100), holder("many", shares=300)], 40_000)
    assert given_by == {"few": 40_000}


def test_those_alike_give_alike() -> None:
    given_by = taken([holder(name) for name in "abcd"], 40_000)
    assert sum(given_by.values()) == 40_000
    assert max(given_by.values()) - min(given_by.values()) <= 1250


holders = st.lists(
    st.builds(
        Holder,
        name=st.uuids().map(str),
        shares=st.integers(1, 1000),
        held=st.integers(0, 1 << 22),
        used=st.integers(0, 1 << 22),
        spare=st.integers(0, 1 << 22),
    ),
    max_size=30,
)


@given(holders, st.integers(0, 1 << 24))
def test_no_more_than_is_needed_and_no_more_than_each_has(vms: list[Holder], need: int) -> None:
    given_by = taken(vms, need)
    spare = {vm.name: vm.spare for vm in vms}
    assert all(0 < pages <= spare[name] for name, pages in given_by.items())
    assert sum(given_by.values()) == min(need, sum(spare.values()))
