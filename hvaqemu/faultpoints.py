"""Named places where a test can have this very process die, stand still, or run out of something.

Off unless the environment variable ``HVAQEMU_FAULT`` names some, so that what is tested is what runs. Its value is a
comma list of ``NAME:ACTION[:FILE]``. ACTION is ``kill`` (SIGKILL to itself), ``stop`` (SIGSTOP to itself) or the name
of an error (``ENOMEM``), which is raised as an ``OSError``. With FILE it happens to the first process that comes there
and can delete FILE, and to no other until FILE is made again; without, always. ``docs/operations.md`` lists the names.
"""

from __future__ import annotations

import errno
import os
import signal
from typing import NamedTuple, Optional

VARIABLE = "HVAQEMU_FAULT"
_SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}


class _Fault(NamedTuple):
    action: str
    file: Optional[str]  # noqa: UP045 (read at run time by Python 3.9)


def _parse(text: str) -> dict[str, _Fault]:
    """:raise ValueError: an action is none of the known ones; better than a test that tests nothing."""
    armed = {}
    for part in filter(None, text.split(",")):
        name, action, *file = part.split(":", 2)
        if action not in _SIGNALS and not hasattr(errno, action):
            raise ValueError(f"{VARIABLE}: {part}: unknown action {action!r}")
        armed[name] = _Fault(action, file[0] if file else None)
    return armed


_armed = _parse(os.environ.get(VARIABLE, ""))


def reach(name: str) -> None:
    """This process has come to the fault point ``name``.

    :raise OSError: what the environment asks for.
    """
    if _armed and name in _armed:
        _act(name, _armed[name])


def _act(name: str, fault: _Fault) -> None:
    if fault.file is not None:
        try:
            os.unlink(fault.file)  # noqa: PTH108 (pathlib is slow to import in the guest)
        except OSError:
            return
    if fault.action in _SIGNALS:
        os.kill(os.getpid(), _SIGNALS[fault.action])
        return
    code = getattr(errno, fault.action)
    raise OSError(code, f"{os.strerror(code)} (at fault point {name})")
