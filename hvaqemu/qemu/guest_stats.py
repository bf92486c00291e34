"""What a guest's balloon driver says of its memory, as QEMU passes it on (QEMU, docs/interop/virtio-balloon-stats.rst).

Needs no agent in the guest, only its balloon driver. The numbers are the guest's: whoever uses one bounds it first.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Protocol

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from hvaqemu.errors import ProtocolError
from hvaqemu.qemu.command import BALLOON_ID
from hvaqemu.qemu.qmp import EXECUTE_SECONDS

_DEVICE = f"/machine/peripheral/{BALLOON_ID}"
#: QEMU's word for what a guest does not tell: -1 as an unsigned number (QEMU, hw/virtio/virtio-balloon.c).
_UNKNOWN = (1 << 64) - 1


def _known(value: Any) -> Any:
    return None if value in (_UNKNOWN, -1) else value


_Figure = Annotated[Annotated[int, Field(ge=0)] | None, BeforeValidator(_known)]


class GuestStats(BaseModel):
    """The newest statistics; None where the guest does not tell."""

    model_config = ConfigDict(frozen=True, extra="ignore", populate_by_name=True)

    #: When they came: seconds since 1970 by the host's clock, whole ones; 0: never.
    updated: int = 0
    #: Bytes: MemTotal, MemFree and MemAvailable, and what was swapped in since boot.
    total: _Figure = Field(default=None, validation_alias="stat-total-memory")
    free: _Figure = Field(default=None, validation_alias="stat-free-memory")
    available: _Figure = Field(default=None, validation_alias="stat-available-memory")
    swapped_in: _Figure = Field(default=None, validation_alias="stat-swap-in")
    #: Since boot.
    major_faults: _Figure = Field(default=None, validation_alias="stat-major-faults")


class Monitor(Protocol):
    """What executes commands: :class:`hvaqemu.qemu.qmp.QmpLink`."""

    async def execute(
        self, command: str, arguments: Mapping[str, object] | None = None, *, timeout: float = EXECUTE_SECONDS
    ) -> object: ...


async def ask_every(qmp: Monitor, seconds: int, timeout: float = EXECUTE_SECONDS) -> None:
    """Have QEMU ask the guest every so many seconds; 0: no more.

    :raise HvaError: as :meth:`hvaqemu.qemu.qmp.QmpLink.execute`.
    """
    await qmp.execute(
        "qom-set",
        {"path": _DEVICE, "property": "guest-stats-polling-interval", "value": seconds},
        timeout=timeout,
    )


async def guest_stats(qmp: Monitor, timeout: float = EXECUTE_SECONDS) -> GuestStats:
    """What the guest said last.

    :raise HvaError: as :meth:`hvaqemu.qemu.qmp.QmpLink.execute`; also before :func:`ask_every` was called.
    """
    answer = await qmp.execute("qom-get", {"path": _DEVICE, "property": "guest-stats"}, timeout=timeout)
    found = answer if isinstance(answer, dict) else {}
    figures = found.get("stats")
    try:
        return GuestStats.model_validate(
            {**(figures if isinstance(figures, dict) else {}), "updated": found.get("last-update", 0)}
        )
    except ValidationError as error:
        raise ProtocolError(f"QMP qom-get guest-stats: {error.errors(include_url=False)[0]['msg']}") from error
