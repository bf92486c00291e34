"""A fleet file: the host's memory for VMs, what holds for all of them, and the VMs. See :mod:`hvaqemu.config`.

Relative paths mean the folder of the file they stand in, also in a VM file that a fleet file names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import (
    AfterValidator,
    Field,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)

from hvaqemu import strict_yaml
from hvaqemu.config import VmConfig, load_vm
from hvaqemu.fields import Config, Flag, Location, Share, Size, Text, absolute, complain
from hvaqemu.reclaim_config import DEFAULTS_KEY, ReclaimKeys
from hvaqemu.units import format_size

#: Where a validation's context has the folder of the fleet file.
_FOLDER_KEY = "folder"
#: Metrics tell what guests do; they are for who may log in to this host.
_LOOPBACK = re.compile(r"127\.\d{1,3}\.\d{1,3}\.\d{1,3}|localhost|\[::1\]")
_ADDRESS = re.compile(r"([A-Za-z0-9.-]+|\[[0-9A-Fa-f:.]+\]):(\d{1,5})")


class Defaults(Config):
    """What holds for VMs that do not say otherwise."""

    reclaim: ReclaimKeys = ReclaimKeys()

    def keys(self) -> Mapping[str, Any]:
        """The keys of ``reclaim`` that were written, as they can be validated again."""
        return self.reclaim.model_dump(mode="json", exclude_unset=True)


class PressureConfig(Config):
    """When the host counts as short of memory, beside ``budget`` and ``available_min``."""

    #: Share of time that some process of the host waited for memory, over 10 seconds (PSI, some avg10).
    psi_some: Annotated[Share, Field(gt=0)] = 0.1
    #: Share of a cgroup's limit that is kept free where one limits the VMs.
    cgroup_headroom: Annotated[Share, Field(lt=1)] = 0.05
    #: Whether guests' balloons may be inflated when nothing else is left.
    balloon: Flag = True


def _listen(value: str, info: ValidationInfo) -> str:
    if "\0" in value:
        raise ValueError("must not contain a NUL")
    value = value.removeprefix("unix:")
    if "/" in value:
        return value
    match = _ADDRESS.fullmatch(value)
    if match is None or not 0 < int(match[2]) < 1 << 16:
        raise ValueError('must be a loopback address and port ("127.0.0.1:9777") or the path of a unix socket')
    if not _LOOPBACK.fullmatch(match[1]) and not info.data.get("anywhere"):
        raise ValueError(
            "must be a loopback address or the path of a unix socket: whoever reaches another sees what guests do "
            "(unless `anywhere` is set)"
        )
    return value


class MetricsConfig(Config):
    """Where metrics can be fetched by Prometheus."""

    # Before the address, which is validated with it.
    #: Whether others than this host's own users may reach them: nobody is asked who they are.
    anywhere: Flag = False
    #: "127.0.0.1:9777", or the path of a unix socket (with a "/", and with or without "unix:" before it).
    listen: Annotated[Text, AfterValidator(_listen)]

    @property
    def path(self) -> Path | None:
        """The unix socket; None where it is an address."""
        return Path(self.listen) if "/" in self.listen else None

    @property
    def address(self) -> tuple[str, int] | None:
        """Host and port; None where it is a unix socket."""
        if "/" in self.listen:
            return None
        host, _, port = self.listen.rpartition(":")
        return host.strip("[]"), int(port)


def _vm(value: Any, _model: ValidatorFunctionWrapHandler, info: ValidationInfo) -> VmConfig:
    if isinstance(value, VmConfig):
        return value
    folder = (info.context or {}).get(_FOLDER_KEY, Path())
    # Absent where it is wrong itself; then that is what is complained about.
    defaults = info.data["defaults"].keys() if "defaults" in info.data else {}
    if isinstance(value, str):
        if not value or "\0" in value:
            raise ValueError("must be the path of a VM file, or a VM")
        return load_vm(absolute(folder, Path(value)), defaults)
    return VmConfig.model_validate(value, context={DEFAULTS_KEY: defaults}).resolved(folder)


class FleetConfig(Config):
    """The VMs of a host, each whole: with what it has from ``defaults``."""

    #: Bytes that backing and store of all VMs together may have; None: as many as ``available_min`` leaves.
    budget: Annotated[Size, Field(gt=0)] | None = None
    #: Bytes of the host's memory that are kept available; None: see hva_host.policy.pressure.
    available_min: Size | None = None
    # Before the VMs, which are validated with them.
    defaults: Defaults = Defaults()
    pressure: PressureConfig = PressureConfig()
    metrics: MetricsConfig | None = None
    #: Each a path of a VM file, or the VM itself.
    vms: tuple[Annotated[VmConfig, WrapValidator(_vm)], ...] = ()

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        first: dict[str, int] = {}
        wrong: list[tuple[Location, str]] = []
        for index, vm in enumerate(self.vms):
            if first.setdefault(vm.name, index) != index:
                wrong.append((("vms", index), f"{vm.name!r} is already the name of VM {first[vm.name]}"))
        if self.budget is not None and (least := sum(vm.reclaim.min_resident for vm in self.vms)) > self.budget:
            wrong.append((("budget",), f"is less than the min_resident of all VMs together, {format_size(least)}"))
        complain(*wrong)
        return self


def load_fleet(path: Path) -> FleetConfig:
    """The fleet that a file describes, with the VMs of the files it names; all paths absolute.

    :raise ConfigError: naming the file, line and key.
    """
    folder = path.parent.absolute()
    fleet = strict_yaml.load(path, FleetConfig, {_FOLDER_KEY: folder})
    if fleet.metrics is None or fleet.metrics.path is None:
        return fleet
    listen = str(absolute(folder, fleet.metrics.path))
    return fleet.model_copy(update={"metrics": fleet.metrics.model_copy(update={"listen": listen})})
