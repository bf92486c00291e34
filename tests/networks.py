"""Network devices and namespaces of the host, as tests look at them and, where something went wrong, remove them.

Everything that tests name begins with :data:`MARK`, so that nobody else's is ever taken for theirs.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from hvaqemu.qemu.host_network import NAMESPACES, new_name, open_tap


def mark_of(pid: int) -> str:
    """What the names begin with that the tests of a process choose."""
    return f"hvt{pid}"


MARK = mark_of(os.getpid())
_DEVICES = Path("/sys/class/net")


def why_no_networks() -> str:
    """Why no networks can be made here; empty where they can."""
    try:
        os.close(open_tap(new_name()))
    except OSError as error:
        return f"no tap devices here: {error.filename}: {error.strerror}"
    done = subprocess.run(["unshare", "--net", "--mount", "true"], capture_output=True, timeout=30)
    return "no network namespaces here" if done.returncode else ""


def devices(mark: str = MARK) -> list[str]:
    """Devices that were made for VMs of the tests, or by the tests."""
    found = []
    for device in _DEVICES.iterdir():
        with suppress(OSError):
            if device.name.startswith(mark) or (device / "ifalias").read_text().startswith(f"hvaqemu {mark}"):
                found.append(device.name)
    return found


def namespaces(mark: str = MARK) -> list[str]:
    """Namespaces of the tests."""
    with suppress(FileNotFoundError):
        return [name for name in os.listdir(NAMESPACES) if name.startswith(mark)]  # noqa: PTH208
    return []


def ip(*words: str) -> str:
    """What iproute2 says."""
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True, timeout=30).stdout


def remove_all(mark: str = MARK) -> list[str]:
    """Remove what tests have left; what it was."""
    left = [*devices(mark), *namespaces(mark)]
    for name in devices(mark):
        subprocess.run(["ip", "link", "del", name], check=False, capture_output=True, timeout=30)
    for name in namespaces(mark):
        subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True, timeout=30)
    return left


@contextmanager
def a_bridge(name: str, address: str) -> Iterator[str]:
    """A bridge of a user's, whose hardware address was chosen: else it would be that of its lowest port."""
    ip("link", "add", name, "address", "02:00:00:00:00:01", "type", "bridge")
    try:
        ip("addr", "add", address, "dev", name)
        ip("link", "set", name, "up")
        yield name
    finally:
        ip("link", "del", name)
