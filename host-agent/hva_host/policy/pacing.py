"""How large steps may be, and how far apart, so that looking for memory costs little itself."""

from __future__ import annotations

from hva_host.pager.coldness import REGION
from hva_host.policy.samples import VmSample
from hva_host.policy.state import Outcome
from hvaqemu.pages import PAGE_SHIFT
from hvaqemu.reclaim_config import ReclaimState

#: Of a vCPU, for scans (one takes some 50 ms a 512 MiB under TCG): of a guest that has nothing to give, and while steps
#: go on. Those that gain little come to an end by themselves, so in the long run the first is what an idle guest pays.
GUEST_SHARE, GUEST_SHARE_STEPPING = 0.005, 0.02
#: Of an epoch with UNUSED candidates: one proposes, two confirm. Others need the first only, and not every time.
_SCANS_UNUSED, _SCANS = 3, 1
#: Between two steps in any case: what was wanted back at once has come back by then (samples are watched for 0.4 s).
INTERVAL_LEAST = 2.0
#: Between two looks at a VM that has nothing to give.
INTERVAL_MOST = 60.0
_REPORT_SECONDS = 20.0
#: Smallest step: 1 MiB, and 1/512 of a large guest's memory, because its steps are further apart.
_STEP_LEAST_PAGES, _STEP_LEAST_SHARE = 256, 512
#: Largest step: 1/8 of memory. One wrong guess is then no more than what a guest reads again in a second.
_STEP_MOST_SHARE = 8
#: An order that was not seen to end by then failed; the driver's own deadlines are shorter.
ORDER_SECONDS = 60.0


def step_least(sample: VmSample) -> int:
    """Pages of the smallest step."""
    return max(_STEP_LEAST_PAGES, (sample.memory_bytes >> PAGE_SHIFT) // _STEP_LEAST_SHARE)


def step_most(sample: VmSample) -> int:
    """Pages of the largest step."""
    return max(step_least(sample), (sample.memory_bytes >> PAGE_SHIFT) // _STEP_MOST_SHARE)


def spared(spare: int, *, sampled: bool) -> int:
    """Of ``spare`` pages, how many a step may be of: one that goes by samples takes what else its last region holds."""
    return max(0, spare - REGION) if sampled else spare


def little(sample: VmSample) -> int:
    """Pages that a step gains at least where it is worth to go on: a quarter of the smallest."""
    return step_least(sample) // 4


def gap_after_scan(sample: VmSample) -> float:
    """Seconds that a scan pays for."""
    return sample.epoch.scan_s / GUEST_SHARE if sample.epoch is not None else 0.0


def report_serves(scan_s: float) -> float:
    """Seconds that steps of pages with content go by one report: those that the guest has to rest after it, and more.

    :param scan_s: of the guest's CPU, that it took.
    """
    return _REPORT_SECONDS + scan_s / GUEST_SHARE_STEPPING


def gap_unscanned(sample: VmSample, outcome: Outcome, cpu_limit: float) -> float:
    """Seconds from the end of a step to the next one, if that needs no scan.

    The pager's CPU time includes the faults it answered meanwhile, so a guest that refaults is stepped at less often.

    :param sample: the look in which it was seen to end.
    :param cpu_limit: share of one host core.
    """
    cpu_s = max(0.0, sample.pager_cpu_s - outcome.order.pager_cpu_s)
    return max(INTERVAL_LEAST, cpu_s / cpu_limit)


def gap_after_step(sample: VmSample, outcome: Outcome, cpu_limit: float) -> float:
    """Seconds from the end of a step to the next one that needs a scan; parameters as for :func:`gap_unscanned`."""
    scan_s = sample.epoch.scan_s if sample.epoch is not None else 0.0
    scans = _SCANS_UNUSED if ReclaimState.UNUSED in outcome.order.states else _SCANS
    if sample.epoch is not None and not sample.epoch.scanned:
        scans = 0
    return max(gap_unscanned(sample, outcome, cpu_limit), scans * scan_s / GUEST_SHARE_STEPPING)
