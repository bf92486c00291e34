"""How a VM's memory is reclaimed: the keys of ``reclaim`` in a VM file, and of ``defaults.reclaim`` in a fleet file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Annotated, Any, Self

from pydantic import AfterValidator, Field, ValidationError, model_validator

from hvaqemu import strict_yaml
from hvaqemu.errors import ConfigError
from hvaqemu.fields import Config, Rate, Share, Size, complain
from hvaqemu.units import MiB, format_size


class ReclaimState(StrEnum):
    """Page states a user can ask to be discarded."""

    UNUSED = "unused"
    VOLATILE = "volatile"
    POTENTIAL = "potential"
    STABLE = "stable"


#: What is discarded where nobody says otherwise.
DEFAULT_STATES = (ReclaimState.UNUSED, ReclaimState.VOLATILE)


def _some_once(states: tuple[ReclaimState, ...]) -> tuple[ReclaimState, ...]:
    if not states or len(set(states)) != len(states):
        raise ValueError(f"name each state once, at least one of {', '.join(ReclaimState)}")
    return states


States = Annotated[tuple[ReclaimState, ...], AfterValidator(_some_once)]


class ReclaimMode(StrEnum):
    """Who decides when a VM's memory is reclaimed."""

    #: Nobody: asking for it is refused too.
    OFF = "off"
    #: Whoever says `reclaim`.
    MANUAL = "manual"
    #: Policy, all the time and slowly, held by the refault budget; more where the host is short.
    PROACTIVE = "proactive"
    #: Policy, where the host is short.
    PRESSURE = "pressure"
    #: Policy, so that backing and store together stay at a size; less where the host is short.
    TARGET = "target"


class ReclaimKeys(Config):
    """The keys of ``reclaim``. Why each default is what it is: docs/policy.md."""

    mode: ReclaimMode = ReclaimMode.MANUAL
    #: What policy may discard.
    states: States = DEFAULT_STATES
    #: Bytes of backing that policy leaves the VM in any case.
    min_resident: Size = 64 * MiB
    #: Bytes of backing and store together, for mode target.
    target: Size | None = None
    #: What share of its working set a guest may refault in a minute, for mode proactive.
    refault_budget: Rate = 0.002
    #: What share of one host core the VM's epochs may take.
    cpu_limit: Annotated[Share, Field(gt=0)] = 0.05
    #: How much of the host's memory the VM has a claim on under pressure, relative to the others'.
    shares: Annotated[int, Field(strict=True, ge=1, le=1_000_000)] = 100


class ReclaimConfig(ReclaimKeys):
    """The keys of ``reclaim`` of one VM, which fit together."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if (self.mode is ReclaimMode.TARGET) is (self.target is None):
            if self.target is None:
                complain((("target",), "is missing: mode target needs the bytes of backing and store to stay at"))
            complain((("target",), f"means nothing in mode {self.mode}; only with mode: target"))
        if self.target is not None and self.target < self.min_resident:
            least = format_size(self.min_resident)
            complain((("target",), f"{format_size(self.target)} is less than min_resident, {least}"))
        return self


#: Where a validation's context has the ``defaults.reclaim`` of a fleet: the keys that were written, with their values.
DEFAULTS_KEY = "reclaim_defaults"


def over(defaults: Mapping[str, Any], own: Any) -> Any:
    """``own`` keys of ``reclaim`` as they were written, with ``defaults`` for those that are not there.

    A default ``target`` is for VMs of mode target; a VM of another mode does not have to deny it.
    """
    if not isinstance(own, Mapping):
        # Complained about by whoever validates it.
        return own
    joined = {**defaults, **own}
    if "target" not in own and joined.get("mode", ReclaimMode.MANUAL) != ReclaimMode.TARGET:
        joined.pop("target", None)
    return joined


def changed(config: ReclaimConfig, words: Sequence[str]) -> ReclaimConfig:
    """``config`` with what ``words`` say, each ``key=value`` or ``reclaim.key=value``, as on a command line.

    Values are written as in a file; ``states`` also as on a command line (``unused,volatile``). A target that is left
    over from mode target goes with the mode.

    :raise ConfigError: naming the key.
    """
    said: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        key = key.removeprefix("reclaim.")
        if not equals or not key:
            raise ConfigError(f"{word!r} is not key=value", "for example reclaim.mode=proactive")
        if key in said:
            raise ConfigError(f"key reclaim.{key}: is given twice")
        value = strict_yaml.value(text, f"key reclaim.{key}")
        said[key] = value.split(",") if key == "states" and isinstance(value, str) else value
    try:
        return ReclaimConfig.model_validate(over(config.model_dump(mode="json", exclude_none=True), said))
    except ValidationError as error:
        raise ConfigError(strict_yaml.explain(error, "reclaim")) from error
