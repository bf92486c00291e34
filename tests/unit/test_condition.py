"""How a VM is, and what is refused in that state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hva_host.agent.condition import Condition
from hva_host.agent.hold import Hold
from hva_host.agent.model import VmState
from hvaqemu.errors import PeerLost, RefusedError
from hvaqemu.qemu.qmp import RunStatus


async def test_a_vm_that_has_ended_says_so_to_whoever_asks(tmp_path: Path) -> None:
    told: list[tuple[str, dict[str, Any]]] = []
    condition = Condition("web", tmp_path / "none", Hold(False, lambda _ours: None), lambda *event: told.append(event))
    condition.running()
    condition.refuse_when_gone()
    condition.refuse_when_still()
    condition.gone("QEMU was killed by SIGKILL")
    for refuse in (condition.refuse_when_gone, condition.refuse_when_still):
        with pytest.raises(PeerLost) as ended:
            refuse()
        assert str(ended.value) == ("VM web has ended: QEMU was killed by SIGKILL ('hvaqemu down web' clears it away)")
    assert condition.failure.result() == "QEMU was killed by SIGKILL"
    # What comes late changes nothing any more.
    condition.catch_up(RunStatus(running=True, status="running"))
    assert condition.state is VmState.GONE
    assert [data["state"] for name, data in told if name == "VM_STATE"] == [VmState.RUNNING, VmState.GONE]


async def test_a_panicked_guest_is_not_asked(tmp_path: Path) -> None:
    console = tmp_path / "console.log"
    console.write_text("[    1.0] Kernel panic - not syncing: sysrq\n[    1.1] Call Trace:\n")
    condition = Condition("web", console, Hold(False, lambda _ours: None), lambda *_event: None)
    condition.catch_up(RunStatus(running=False, status="guest-panicked"))
    condition.refuse_when_gone()
    with pytest.raises(RefusedError, match=r"panicked: .*not syncing: sysrq"):
        condition.refuse_when_still()
