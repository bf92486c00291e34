"""QMP events the project acts on, as values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class QmpEvent:
    """Something QEMU told us without being asked."""

    #: Seconds since the epoch, by QEMU's clock.
    time: float


@dataclass(frozen=True)
class Shutdown(QmpEvent):
    """QEMU is about to end (or, with ``-no-shutdown``, to stop)."""

    #: The guest wanted it.
    guest: bool
    #: QEMU's word: guest-shutdown, guest-panic, host-qmp-quit, host-signal, ...
    reason: str


@dataclass(frozen=True)
class Reset(QmpEvent):
    """The machine starts again; its RAM stays as it is."""

    guest: bool
    reason: str


@dataclass(frozen=True)
class GuestPanicked(QmpEvent):
    """The guest's kernel gave up."""

    #: What QEMU does of it: pause, poweroff, run.
    action: str


@dataclass(frozen=True)
class Powerdown(QmpEvent):
    """The guest was asked to shut down."""


@dataclass(frozen=True)
class Stop(QmpEvent):
    """No vCPU runs."""


@dataclass(frozen=True)
class Resume(QmpEvent):
    """vCPUs run (again)."""


@dataclass(frozen=True)
class BalloonChange(QmpEvent):
    """The guest gave memory to, or took it from, the balloon."""

    #: Bytes the guest is left with.
    actual: int


@dataclass(frozen=True)
class DeviceDeleted(QmpEvent):
    """A device is gone; ``device`` is "" where it had no id."""

    device: str
    path: str


@dataclass(frozen=True)
class OtherEvent(QmpEvent):
    """An event nobody here acts on."""

    name: str
    data: Mapping[str, object]


def parse_event(message: Mapping[str, object]) -> QmpEvent:
    """The event in a QMP message. One that lacks what it should have is an :class:`OtherEvent`."""
    stamp = message.get("timestamp")
    name = str(message.get("event"))
    given = message.get("data")
    data: Mapping[str, object] = given if isinstance(given, Mapping) else {}
    time = 0.0
    if isinstance(stamp, Mapping):
        seconds, micros = stamp.get("seconds"), stamp.get("microseconds")
        if isinstance(seconds, int) and isinstance(micros, int) and seconds >= 0:
            time = seconds + micros / 1e6
    try:
        return _known(name, time, data)
    except (KeyError, TypeError, ValueError):
        return OtherEvent(time, name, data)


def _known(name: str, time: float, data: Mapping[str, object]) -> QmpEvent:
    if name == "SHUTDOWN":
        return Shutdown(time, bool(data["guest"]), str(data.get("reason", "")))
    if name == "RESET":
        return Reset(time, bool(data["guest"]), str(data.get("reason", "")))
    if name == "GUEST_PANICKED":
        return GuestPanicked(time, str(data["action"]))
    if name == "BALLOON_CHANGE":
        actual = data["actual"]
        if not isinstance(actual, int):
            raise TypeError(name)
        return BalloonChange(time, actual)
    if name == "DEVICE_DELETED":
        return DeviceDeleted(time, str(data.get("device", "")), str(data["path"]))
    simple: dict[str, type[QmpEvent]] = {"STOP": Stop, "RESUME": Resume, "POWERDOWN": Powerdown}
    return simple[name](time)
