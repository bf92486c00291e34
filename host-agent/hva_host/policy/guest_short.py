"""Whether a guest is short of memory itself: then what it holds is what it needs, and taking it costs it most.

The guest says so itself, and lies only to its own loss: a guest that always claims to be short keeps its memory until
the host is short too.
"""

from __future__ import annotations

from dataclasses import replace

from hva_host.policy.rates import EMPTY
from hva_host.policy.samples import VmSample
from hva_host.policy.state import GuestShort
from hvaqemu.pages import PAGE_SIZE
from hvaqemu.units import MiB, format_share, format_size

#: Some task waited for memory for more than this share of the last 10 s. Reclaim in the guest's own kernel that keeps
#: up stays below 1 %; systemd-oomd's default for killing is 60 %.
PSI_SOME = 0.1
#: What a guest can still get without swapping: below the larger of these its own kernel is about to evict.
AVAILABLE_SHARE, AVAILABLE_BYTES = 0.05, 16 * MiB
#: Pages that its kernel evicted and read again, a minute, as a share of its memory.
WORKINGSET_SHARE = 0.02
#: How long it is left alone: PSI's 10 s average and the window of refaults have gone by then.
ALONE_SECONDS = 60.0
#: Older words of a guest decide nothing.
WORD_SECONDS = 30.0


def judged(state: GuestShort, sample: VmSample, now: float) -> GuestShort:
    """What is to be remembered after another look; the guest is short while ``until_s`` is ahead."""
    word = sample.guest
    if word is None or word.age_s > WORD_SECONDS:
        return state
    window = state.refaults
    if word.workingset_refaults is not None:
        said_s = sample.at_s - word.age_s
        if not window.points or said_s > window.points[-1][0]:
            window = window.with_point(said_s, word.workingset_refaults)
    else:
        window = EMPTY
    reason = _reason(sample, window.per_minute)
    if reason:
        return GuestShort(window, now + ALONE_SECONDS, reason)
    return replace(state, refaults=window)


def _reason(sample: VmSample, refaults: float | None) -> str:
    word = sample.guest
    assert word is not None
    if word.psi_some is not None and word.psi_some > PSI_SOME:
        return f"its tasks waited for memory {format_share(round(word.psi_some, 3))} of the time"
    least = max(AVAILABLE_BYTES, int(word.total_bytes * AVAILABLE_SHARE))
    if word.available_bytes < least:
        return f"it has {format_size(word.available_bytes)} available, less than {format_size(least)}"
    if refaults is not None and refaults * PAGE_SIZE > word.total_bytes * WORKINGSET_SHARE:
        return f"its kernel reads {refaults:.0f} evicted pages a minute again"
    return ""
