"""Whether a guest is short of memory itself."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from hva_host.policy.guest_short import ALONE_SECONDS, WORD_SECONDS, judged
from hva_host.policy.samples import GuestWord, VmSample
from hva_host.policy.state import GuestShort
from hvaqemu.units import GiB, MiB
from tests.unit.policy_samples import VM

WORD = GuestWord(age_s=0.0, total_bytes=512 * MiB, available_bytes=300 * MiB, psi_some=0.0, workingset_refaults=0)


def said(now: float = 100.0, **word: Any) -> VmSample:
    return replace(VM, at_s=now, guest=replace(WORD, **word))


@pytest.mark.parametrize(
    ("word", "reason"),
    [
        ({"psi_some": 0.11}, "its tasks waited for memory 11% of the time"),
        ({"available_bytes": 20 * MiB}, "it has 20.0 MiB available, less than 25.6 MiB"),
        ({"total_bytes": 128 * MiB, "available_bytes": 15 * MiB}, "it has 15.0 MiB available, less than 16.0 MiB"),
    ],
)
def test_a_guest_that_says_so_is_left_alone_for_a_while(word: dict[str, Any], reason: str) -> None:
    state = judged(GuestShort(), said(**word), 100.0)
    assert (state.until_s, state.reason) == (100 + ALONE_SECONDS, reason)
    # And not for longer, once it does not say so any more.
    assert judged(state, said(110.0), 110.0).until_s == 100 + ALONE_SECONDS


@pytest.mark.parametrize(
    "word", [{}, {"psi_some": 0.1}, {"psi_some": None}, {"total_bytes": 16 * GiB, "available_bytes": GiB}]
)
def test_a_guest_that_does_not(word: dict[str, Any]) -> None:
    assert judged(GuestShort(), said(**word), 100.0).until_s < 0


def test_old_words_decide_nothing() -> None:
    assert judged(GuestShort(), said(psi_some=0.9, age_s=WORD_SECONDS + 1), 100.0) == GuestShort()
    assert judged(GuestShort(), replace(VM, guest=None), 100.0) == GuestShort()


def test_pages_that_its_kernel_reads_again() -> None:
    """Two of a hundred pages of its memory a minute."""
    for per_second, short in ((10, False), (100, True)):
        state = GuestShort()
        for now in range(100, 160, 5):
            state = judged(state, said(float(now), workingset_refaults=per_second * now), float(now))
        assert (state.until_s > 0) is short, state


def test_a_word_that_was_heard_before_is_no_new_point() -> None:
    state = judged(GuestShort(), said(100.0, workingset_refaults=1000), 100.0)
    again = judged(state, said(105.0, age_s=5.0, workingset_refaults=1000), 105.0)
    assert again.refaults == state.refaults
