"""What policy thinks of a VM, as it is shown."""

from __future__ import annotations

import pytest

from hva_host.agent.policy_status import policy_status
from hva_host.cli.status import _policy
from hva_host.policy.decisions import Phase, View
from tests.unit.policy_samples import config

_VIEW = View("a", Phase.COOLING, 1000, 90.0, 60.0, 0, next_s=500.0, reason="a pause")
_PROACTIVE = config(mode="proactive")


def test_a_pause_is_shown_with_its_end() -> None:
    status = policy_status(_PROACTIVE, _VIEW, now=260.0)
    assert status.again_s == 240.0
    assert "cooling (a pause); goes on in 4 min 0 s" in _policy(status)


@pytest.mark.parametrize("now", [495.0, 600.0])
def test_what_is_near_or_past_is_not_waited_for(now: float) -> None:
    status = policy_status(_PROACTIVE, _VIEW, now)
    assert status.again_s == max(0.0, 500.0 - now)
    assert "goes on" not in _policy(status)


def test_of_a_vm_that_policy_leaves_alone_only_the_mode_is_known() -> None:
    assert policy_status(config(mode="manual"), None, 0.0).model_dump(exclude_defaults=True) == {"mode": "manual"}
