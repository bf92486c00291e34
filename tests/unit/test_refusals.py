"""The reasons for which nothing is discarded."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hva_host.agent.refusals import Refusals, Source
from hvaqemu.errors import RefusedError


@given(st.lists(st.tuples(st.sampled_from(Source), st.sampled_from(["", "one", "two"]))))
def test_word_comes_exactly_of_changes_and_says_the_present(said: list[tuple[Source, str]]) -> None:
    heard: list[str] = [""]
    refusals, known = Refusals(heard.append), dict.fromkeys(Source, "")
    for source, reason in said:
        refusals.set(source, reason)
        known[source] = reason
        assert refusals.text == heard[-1] == "; ".join(known[source] for source in Source if known[source])
    assert all(one != other for one, other in itertools.pairwise(heard))


def test_one_reason_is_enough_and_none_is_needed() -> None:
    refusals = Refusals(lambda _text: None)
    refusals.check()
    refusals.set(Source.LAYERS, "golden.raw is open for writing")
    refusals.set(Source.QEMU, "")
    with pytest.raises(RefusedError, match="golden"):
        refusals.check()
    refusals.set(Source.LAYERS, "")
    refusals.check()
