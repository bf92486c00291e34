"""A minute of ``make soak``: whoever is killed, in whatever order, the guest's bytes are right."""

from __future__ import annotations

from itertools import islice

import pytest

from tests.soak.deeds import How, Target, deeds
from tests.soak.outcome import SEVERAL, Outcome, by_deed, show
from tests.soak.soak import Options, run
from tests.vm.board import Gap

_SECONDS = 60.0
#: Where others keep the processor busy, a minute is not long enough for it to be a test.
_MOST = 300.0
_SEED = 20260


def lacking(outcome: Outcome) -> dict[str, int]:
    """Of what makes it a test, all died, often, while there was something to lose: what is still too little."""
    wanted = {
        "pagers killed": (outcome.kills[Target.PAGER], 10),
        "host agents killed": (outcome.kills[Target.HOST_AGENT], 4),
        "guest agents killed": (outcome.kills[Target.GUEST_AGENT], 1),
        "pagers' parents killed": (outcome.kills[Target.PAGER_PARENT], 1),
        "pager restarts": (outcome.pager_restarts, 5),
        "epochs": (outcome.epochs, 20),
        "pages discarded": (outcome.discarded_pages, 20_000),
        "refaults": (outcome.refaults, 5_000),
        "rounds of each of the guest's workers": (min(outcome.verified.values(), default=0), 1),
    }
    return {what: found for what, (found, least) in wanted.items() if found < least}


@pytest.mark.timeout(1500)
def test_a_minute_of_soak() -> None:
    outcome = run(Options(_SECONDS, _SEED, most=_MOST), print, enough=lambda so_far: not lacking(so_far))
    show(outcome)
    assert outcome.problems == []
    assert lacking(outcome) == {}


def test_deeds_are_the_same_for_the_same_seed() -> None:
    first, again, other = (list(islice(deeds(seed), 500)) for seed in (1, 1, 2))
    assert first == again != other
    assert {deed.how for deed in first} == set(How)
    assert {target for deed in first for target in deed.targets} == set(Target)
    assert any(len(deed.targets) == 2 for deed in first)


def test_a_gap_belongs_to_the_last_deed_before_it() -> None:
    done = [(10.0, "a"), (11.0, "b"), (12.0, "a")]
    gaps = [Gap(8.0, 0.5), Gap(9.99, 0.5), Gap(11.5, 0.4), Gap(10.7, 0.7), Gap(12.1, 0.2)]
    found = by_deed(done, gaps)
    assert (found["a"].times, found["a"].longest_s, found["b"].longest_s) == (2, 0.5, 0.4)
    assert (found[SEVERAL].times, found[SEVERAL].longest_s) == (1, 0.7)
