"""No huge page ever stands behind a guest's RAM, whatever the host gives to others: punching part of one frees nothing.

The host's setting is changed for it, so other tests wait (``tests/privileged.py``): a module of its own.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from hva_host.agent import hazards
from hvaqemu.pages import STATE_MASK, PageState
from hvaqemu.units import MiB
from tests.privileged import HostSettings
from tests.vm.harness import (
    BOTH,
    UNUSED,
    VOLATILE,
    Guest,
    running_guest,
)

#: Whoever changes the host's settings waits for all modules that depend on them, and waiting counts.
pytestmark = pytest.mark.timeout(1800)

_MEMORY = 256 * MiB


@pytest.mark.parametrize(("setting", "kernel_args"), [("advise", ""), ("always", "page_poison=1")])
async def test_no_huge_page_stands_behind_ram(host_settings: HostSettings, setting: str, kernel_args: str) -> None:
    """QEMU asks for them (MADV_HUGEPAGE), and the host would give them; the shim declines.

    The second guest checks the content of its free pages: those are never discarded, copies are.
    """
    with host_settings.shmem_enabled(setting):
        async with running_guest("huge", memory=_MEMORY, kernel_args=kernel_args) as guest:
            tree = await guest.tree_digest()
            for _ in range(2):
                result = await guest.vm.reclaim(BOTH)
                assert result.discarded > 5_000
                assert figures(guest.qemu_pid)["ShmemPmdMapped"] == 0
                assert await guest.tree_digest() == tree
            await guest.vm.restore()
            assert figures(guest.qemu_pid)["ShmemPmdMapped"] == 0
            assert hazards.of_process(guest.qemu_pid) == ""
            assert await guest.complaints() == []
            if kernel_args:
                await unused_is_refused(guest)


async def unused_is_refused(guest: Guest) -> None:
    assert "POISONING is on" in await guest.run("dmesg"), "this kernel does not check free pages"
    status = await guest.vm.status()
    assert status.reclaim_refused == "unused: the guest checks the content of its free pages (page_poison)"
    epochs = (await guest.vm.reclaim(BOTH)).epochs
    assert sum(stats.discarded_layer for stats in epochs) > 1_000
    free = guest.classes() & STATE_MASK == PageState.UNUSED
    before = guest.presence() & free
    assert before.sum() > 1_000
    stats = await guest.epoch(UNUSED)
    # Zeros are discarded wherever they are found: they come back as zeros, so they are copies.
    assert stats.discarded == stats.discarded_zero < before.sum() / 10
    assert (guest.presence() & before).sum() > before.sum() * 0.9
    assert stats.unconfirmed == 0
    assert (await guest.epoch(VOLATILE)).note == ""


def figures(pid: int) -> dict[str, int]:
    """KiB by name, of the mapping that is guest RAM."""
    found: dict[str, int] = {}
    ours = False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        words = line.split()
        if not words[0].endswith(":"):
            ours = words[-2:] == ["/memfd:memory-backend-memfd", "(deleted)"]
        elif ours and words[-1] == "kB":
            found[words[0][:-1]] = found.get(words[0][:-1], 0) + int(words[1])
    assert found["Rss"] > 0
    return found
