"""QMP events as values."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvaqemu.qemu.events import (
    BalloonChange,
    DeviceDeleted,
    GuestPanicked,
    OtherEvent,
    Powerdown,
    QmpEvent,
    Reset,
    Resume,
    Shutdown,
    Stop,
    parse_event,
)

STAMP = {"seconds": 100, "microseconds": 500_000}


@pytest.mark.parametrize(
    ("name", "data", "event"),
    [
        ("SHUTDOWN", {"guest": True, "reason": "guest-shutdown"}, Shutdown(100.5, True, "guest-shutdown")),
        ("SHUTDOWN", {"guest": False, "reason": "host-qmp-quit"}, Shutdown(100.5, False, "host-qmp-quit")),
        ("RESET", {"guest": True, "reason": "guest-reset"}, Reset(100.5, True, "guest-reset")),
        ("GUEST_PANICKED", {"action": "pause", "info": {"type": "s390"}}, GuestPanicked(100.5, "pause")),
        ("POWERDOWN", None, Powerdown(100.5)),
        ("STOP", None, Stop(100.5)),
        ("RESUME", None, Resume(100.5)),
        ("BALLOON_CHANGE", {"actual": 4096}, BalloonChange(100.5, 4096)),
        ("DEVICE_DELETED", {"device": "d", "path": "/p"}, DeviceDeleted(100.5, "d", "/p")),
        ("DEVICE_DELETED", {"path": "/p"}, DeviceDeleted(100.5, "", "/p")),
        ("JOB_STATUS_CHANGE", {"id": "j"}, OtherEvent(100.5, "JOB_STATUS_CHANGE", {"id": "j"})),
        ("BALLOON_CHANGE", {"actual": "x"}, OtherEvent(100.5, "BALLOON_CHANGE", {"actual": "x"})),
        ("SHUTDOWN", {}, OtherEvent(100.5, "SHUTDOWN", {})),
    ],
)
def test_known_events(name: str, data: Mapping[str, object] | None, event: QmpEvent) -> None:
    message: dict[str, object] = {"event": name, "timestamp": STAMP}
    if data is not None:
        message["data"] = data
    assert parse_event(message) == event


def test_no_clock() -> None:
    """QEMU says -1 where the host's clock could not be read (qmp-spec)."""
    assert parse_event({"event": "STOP", "timestamp": {"seconds": -1, "microseconds": -1}}) == Stop(0.0)


json_values = st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda children: st.lists(children))
known = st.sampled_from(["SHUTDOWN", "RESET", "GUEST_PANICKED", "BALLOON_CHANGE", "DEVICE_DELETED", "STOP"])


@given(st.fixed_dictionaries({"event": known | json_values}, optional={"data": json_values, "timestamp": json_values}))
def test_any_message_is_an_event(message: dict[str, object]) -> None:
    assert isinstance(parse_event(message), QmpEvent)
