"""What all tests share: places of their own for running VMs, and proof that no process of theirs is left at the end.

The image cache is the user's: images are content-addressed, and building one takes a minute.
"""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

#: Seconds for what has been told to end.
_GRACE = 10.0


@pytest.fixture(scope="session", autouse=True)
def places() -> Iterator[Path]:
    """A short folder that holds the runtime directory ``r`` and the state directory ``s`` of all tests."""
    base = Path(tempfile.mkdtemp(prefix="hvt-", dir="/tmp"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HVAQEMU_RUNTIME_DIR", str(base / "r"))
        patch.setenv("HVAQEMU_STATE_DIR", str(base / "s"))
        yield base
        left = _end_survivors(base)
    shutil.rmtree(base, ignore_errors=True)
    assert not left, f"processes of the tests were still there, and were killed: {'; '.join(left)}"


def _end_survivors(base: Path) -> list[str]:
    deadline = time.monotonic() + _GRACE
    while (found := _processes_of(base)) and time.monotonic() < deadline:
        time.sleep(0.1)
    for pid in found:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return [f"{pid} {command}" for pid, command in found.items()]


def _processes_of(base: Path) -> dict[int, str]:
    """Live processes, other than this one, whose environment, command line or open files name ``base``."""
    found: dict[int, str] = {}
    mark = os.fsencode(base)
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit() or int(folder.name) == os.getpid():
            continue
        # Gone meanwhile, or another user's: neither is ours.
        with suppress(OSError):
            command = (folder / "cmdline").read_bytes()
            if not command:
                continue
            named = mark in command or mark in (folder / "environ").read_bytes()
            if named or any(mark in os.fsencode(link.readlink()) for link in (folder / "fd").iterdir()):
                found[int(folder.name)] = command.replace(b"\0", b" ").decode(errors="backslashreplace")[:120]
    return found
