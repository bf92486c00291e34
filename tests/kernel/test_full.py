"""A host without memory or room: what was full is said, nothing is lost, and it works once there is room."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hva_host.pager.epoch import Phase
from hvaqemu.errors import LaunchError
from tests.kernel.faults import Machine

_BUILD = """
import sys
from pathlib import Path
from hva_host.memory.index import build_index
from hvaqemu.errors import HostError
try:
    build_index(Path(sys.argv[1]), Path(sys.argv[2]) / "golden.idx")
except HostError as error:
    print(error)
print(sorted(path.name for path in Path(sys.argv[2]).iterdir()))
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_no_room_for_an_index(tmp_path: Path) -> None:
    """A file system of 16 KiB, which this test alone sees."""
    golden, full = tmp_path / "golden.raw", tmp_path / "full"
    golden.write_bytes(os.urandom(4096 * 4096))
    full.mkdir()
    script = 'mount -t tmpfs -o size=16k full "$1" && exec "$2" -c "$3" "$4" "$1"'
    command = ["unshare", "-m", "sh", "-ec", script, "sh", str(full), sys.executable, _BUILD, str(golden)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    said, left = done.stdout.splitlines()
    assert said == f"{full}/golden.idx: No space left on device (make room for the index)"
    assert left == "[]", "half an index is none"


async def test_no_memory_for_a_ledger(tmp_path: Path) -> None:
    machine = Machine(tmp_path, {"ledger.allocate": "ENOMEM"})
    machine.arm("ledger.allocate")
    try:
        with pytest.raises(LaunchError, match=r"the VM's ledger: Cannot allocate memory .* (1|2) MiB of host memory"):
            await machine.start()
        # The guest did not run yet, and nothing was done to it.
        await machine.pager.start(machine.child.pid, machine.layers)
        assert await machine.epoch() is not None
        await machine.check()
    finally:
        await machine.close()


@pytest.mark.parametrize(
    ("point", "phase"), [("uffd.protect", Phase.PROTECTING), ("pager.discard.punch", Phase.PROVING)]
)
async def test_an_epoch_meets_a_host_without_memory(tmp_path: Path, point: str, phase: Phase) -> None:
    machine = Machine(tmp_path, {point: "ENOMEM"})
    try:
        await machine.start()
        machine.arm(point)
        done = await machine.epoch()
        assert done is not None
        assert done["note"].startswith(f"abandoned while {phase}: Cannot allocate memory")
        assert done["discarded"] == 0
        await machine.check()
        assert (await machine.epoch() or {})["discarded"] > 100
        await machine.check()
        assert machine.restarts == 0
    finally:
        await machine.close()


async def test_a_page_meets_a_host_without_memory(tmp_path: Path) -> None:
    """It is tried again: the guest only waits a little longer."""
    machine = Machine(tmp_path, dict.fromkeys(("uffd.copy", "uffd.zero"), "ENOMEM"))
    try:
        await machine.start()
        assert await machine.epoch() is not None
        for point in machine.points:
            machine.arm(point)
        await machine.check()
        assert not any(machine.armed(point) for point in machine.points)
        assert machine.restarts == 0
    finally:
        await machine.close()
