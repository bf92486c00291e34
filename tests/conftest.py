"""What all tests share: places of their own for running VMs, and proof that nothing of theirs is left at the end.

The image cache is the user's: images are content-addressed, and building one takes a minute.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import hypothesis
import pytest

from tests import networks
from tests.privileged import HostSettings

#: Seconds for what has been told to end.
_GRACE = 10.0
_VARIABLES = ("HVAQEMU_RUNTIME_DIR", "HVAQEMU_STATE_DIR")
#: All places of VMs that a test has had; a folder below /tmp may choose others than ours.
_places: set[str] = set()

# How long an example takes says how busy the machine is, and nothing of what is tested.
hypothesis.settings.register_profile("busy", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("busy")


#: Names the folder in which the processes that run tests note their places, each in a file named by its pid.
_NOTED = "HVATEST_PLACES"


def pytest_configure() -> None:
    if _NOTED not in os.environ:
        os.environ[_NOTED] = tempfile.mkdtemp(prefix="hvt-places-", dir="/tmp")


def pytest_unconfigure(config: pytest.Config) -> None:
    """What an interrupted run leaves: its processes are given little time to undo what they did."""
    if hasattr(config, "workerinput"):
        return
    noted = list(Path(os.environ[_NOTED]).iterdir())
    for file in noted:
        _places.update(file.read_text().splitlines())
    left = _end_survivors()
    for file in noted:
        left += networks.remove_all(networks.mark_of(int(file.name)))
    shutil.rmtree(os.environ[_NOTED])
    for what in left:
        sys.stderr.write(f"still there, and ended: {what}\n")


def pytest_sessionstart() -> None:
    # A shell starts what runs in its background with SIGINT ignored, and all that tests start would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # As Ctrl-C: fixtures are undone, and nothing that tests have started goes on without them.
    signal.signal(signal.SIGTERM, signal.default_int_handler)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup() -> Iterator[None]:
    try:
        return (yield)
    finally:
        _note_places()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Iterator[None]:
    # Before the test's own fixtures are undone, whatever they set.
    try:
        return (yield)
    finally:
        _note_places()


@pytest.fixture(scope="session", autouse=True)
def places() -> Iterator[Path]:
    """A short folder that holds the runtime directory ``r`` and the state directory ``s`` of all tests."""
    base = Path(tempfile.mkdtemp(prefix="hvt-", dir="/tmp"))
    with pytest.MonkeyPatch.context() as patch:
        for name, folder in zip(_VARIABLES, "rs", strict=True):
            patch.setenv(name, str(base / folder))
        yield base
        left = _end_survivors()
    shutil.rmtree(base, ignore_errors=True)
    devices = networks.remove_all()
    assert not left, f"processes of the tests were still there, and were killed: {'; '.join(left)}"
    assert not devices, f"networks of the tests were still there, and were removed: {', '.join(devices)}"


@pytest.fixture(scope="session")
def host_settings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HostSettings]:
    """For tests that change settings of the host; others are kept from running meanwhile by :func:`settled`."""
    folder = tmp_path_factory.getbasetemp()
    settings = HostSettings(folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder)
    yield settings
    settings.close()


@pytest.fixture(scope="module")
def networks_allowed() -> None:
    """Skips where no networks can be made."""
    if why := networks.why_no_networks():
        pytest.skip(why)


@pytest.fixture(scope="module")
def settled(host_settings: HostSettings) -> Iterator[None]:
    """The host's settings stay as they are while a module runs, but for what it changes itself."""
    with host_settings.left_alone():
        yield


def _note_places() -> None:
    if new := {os.environ[name] for name in _VARIABLES if name in os.environ} - _places:
        _places.update(new)
        with Path(os.environ[_NOTED], str(os.getpid())).open("a") as noted:
            noted.writelines(f"{place}\n" for place in new)


def _end_survivors() -> list[str]:
    deadline = time.monotonic() + _GRACE
    while (found := _survivors()) and time.monotonic() < deadline:
        # They are nobody's children here: no event tells of their end.
        time.sleep(0.1)
    for pid in found:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return [f"{pid} {command}" for pid, command in found.items()]


def _survivors() -> dict[int, str]:
    """Live processes, other than this one, whose environment, command line or open files name a place of the tests."""
    found: dict[int, str] = {}
    marks = [os.fsencode(place) for place in _places]
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit() or int(folder.name) == os.getpid():
            continue
        # Gone meanwhile, or another user's: neither is ours.
        with suppress(OSError):
            command = (folder / "cmdline").read_bytes()
            if not command:
                continue
            said = [command, (folder / "environ").read_bytes()]
            said += [os.fsencode(link.readlink()) for link in (folder / "fd").iterdir()]
            if any(mark in text for mark in marks for text in said):
                found[int(folder.name)] = command.replace(b"\0", b" ").decode(errors="backslashreplace")[:120]
    return found
