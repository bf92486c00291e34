"""What policy thinks of a VM, as users are shown it."""

from __future__ import annotations

from hva_host.agent.model import PolicyStatus
from hva_host.policy.decisions import View
from hvaqemu.pages import PAGE_SIZE
from hvaqemu.reclaim_config import ReclaimConfig


def policy_status(config: ReclaimConfig, view: View | None, now: float) -> PolicyStatus:
    """The record for ``status``.

    :param view: None: policy does not govern the VM.
    :param now: of the looks' clock.
    """
    if view is None:
        return PolicyStatus(mode=config.mode, target_bytes=config.target)
    return PolicyStatus(
        mode=config.mode,
        phase=view.phase,
        reason=view.reason,
        again_s=max(0.0, view.next_s - now),
        working_set_bytes=None if view.working_set is None else view.working_set * PAGE_SIZE,
        refaults_per_minute=view.refault_rate,
        budget_per_minute=view.budget,
        target_bytes=config.target,
    )
