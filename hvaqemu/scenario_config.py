"""A scenario: a VM and the steps to play on it. Each step is a mapping with exactly one verb among its keys."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)

from hvaqemu import load_config, strict_yaml
from hvaqemu.bounds import SizeBounds
from hvaqemu.config import VmConfig
from hvaqemu.fields import Config, Count, Location, Name, Seconds, Size, complain
from hvaqemu.load_config import LoadExpectStep, LoadStep, LoadStopStep
from hvaqemu.reclaim_config import DEFAULT_STATES, ReclaimConfig, States
from hvaqemu.units import format_size


def _command(text: str) -> str:
    if not text.strip() or "\0" in text:
        raise ValueError("must be a shell command")
    return text


class GuestStep(Config):
    """Run a shell command in the guest; it must exit with 0 in time."""

    guest: Annotated[str, AfterValidator(_command)]
    #: Keep its standard output under this name.
    save: Name | None = None
    timeout: Seconds = 60.0


class MeasureStep(Config):
    """Measure the VM and keep it under a name."""

    measure: Name


class ReclaimPlan(Config):
    """What to reclaim, and how long to go on: until an epoch gains less than 1 %, or as the fields say."""

    states: States = DEFAULT_STATES
    #: Exactly so many epochs.
    epochs: Count | None = None
    #: Seconds from the start of one epoch to the start of the next, beside the steps that follow, until stopped.
    every: Seconds | None = None

    @model_validator(mode="after")
    def _one_way_to_end(self) -> Self:
        if self.epochs is not None and self.every is not None:
            complain((("every",), "goes on until `reclaim: stop`; it can not be given with epochs"))
        return self


class ReclaimStep(Config):
    """Run epochs."""

    reclaim: ReclaimPlan


class ReclaimStopStep(Config):
    """End the reclaim that runs beside the steps."""

    reclaim: Literal["stop"]


class SetStep(Config):
    """From now on the VM's memory is reclaimed as a VM file's ``reclaim`` with these keys says."""

    set: ReclaimConfig


class Nothing(Config):
    """A verb without parameters: ``restore: {}`` or just ``restore:``."""


class RestoreStep(Config):
    """Make every page resident."""

    restore: Annotated[Nothing, BeforeValidator(lambda value: {} if value is None else value)]


class BalloonStep(Config):
    """Set the guest's balloon so that the guest keeps ``balloon`` bytes."""

    balloon: Size
    timeout: Seconds = 60.0


class SleepStep(Config):
    """Wait."""

    sleep: Seconds


class SameStep(Config):
    """Saved outputs must be equal, byte for byte."""

    same: Annotated[tuple[Name, ...], Field(min_length=2)]


class Expectation(Config):
    """What must hold of a measure: of its backing, or of that and the compressed store together."""

    measure: Name
    backing: SizeBounds | None = None
    backing_and_store: SizeBounds | None = None

    @model_validator(mode="after")
    def _some(self) -> Self:
        if not self.bounds():
            complain(((), "needs backing or backing_and_store"))
        return self

    def bounds(self) -> list[tuple[str, SizeBounds]]:
        """What is bounded, by the name of its key."""
        found = (("backing", self.backing), ("backing_and_store", self.backing_and_store))
        return [(name, bounds) for name, bounds in found if bounds is not None]


class ExpectStep(Config):
    """Check an earlier measure."""

    expect: Expectation


Step = (
    GuestStep
    | MeasureStep
    | ReclaimStep
    | ReclaimStopStep
    | SetStep
    | RestoreStep
    | BalloonStep
    | SleepStep
    | SameStep
    | ExpectStep
    | LoadStep
    | LoadStopStep
    | LoadExpectStep
)

_VERBS: dict[str, type[Step]] = {
    "guest": GuestStep,
    "measure": MeasureStep,
    "reclaim": ReclaimStep,
    "set": SetStep,
    "restore": RestoreStep,
    "balloon": BalloonStep,
    "sleep": SleepStep,
    "same": SameStep,
    "expect": ExpectStep,
    "load": LoadStep,
}
#: What ends a step that goes on beside others: the same verb, and `stop`.
_STOPS: dict[type[Step], type[Step]] = {ReclaimStep: ReclaimStopStep, LoadStep: LoadStopStep}


def verb_of(step: Step) -> str:
    """The verb of a step: its first field, as the classes above are written."""
    return next(iter(type(step).model_fields))


def _step(data: Any, _union: ValidatorFunctionWrapHandler) -> Step:
    if isinstance(data, Step):
        return data
    if not isinstance(data, Mapping):
        raise ValueError(f"a step is a mapping with one of {', '.join(_VERBS)}")
    verbs = [key for key in data if key in _VERBS]
    if len(verbs) != 1:
        found = f"not {' and '.join(verbs)}" if verbs else f"not {', '.join(map(str, data)) or 'nothing'}"
        raise ValueError(f"a step has exactly one of {', '.join(_VERBS)}, {found}")
    model = _VERBS[verbs[0]]
    value = data[verbs[0]]
    if isinstance(value, str):
        model = _STOPS.get(model, model)
    elif model is ExpectStep and isinstance(value, Mapping) and "load" in value:
        model = LoadExpectStep
    # A ValidationError raised here keeps its places: pydantic puts them below this step's.
    return model.model_validate(data)


class Scenario(Config):
    """A VM and what to do with it, in order."""

    vm: VmConfig
    steps: tuple[Annotated[Step, WrapValidator(_step)], ...] = ()

    @model_validator(mode="after")
    def _steps_fit_together(self) -> Self:
        complain(*_complaints(self), *load_config.complaints(self.steps, self.vm.network))
        return self

    def resolved(self, folder: Path) -> Scenario:
        """The same with absolute paths, where relative ones mean ``folder``."""
        return self.model_copy(update={"vm": self.vm.resolved(folder)})


def _complaints(scenario: Scenario) -> Iterator[tuple[Location, str]]:
    saved: set[str] = set()
    measured: set[str] = set()
    running = False
    for index, step in enumerate(scenario.steps):
        here: Location = ("steps", index)
        if isinstance(step, GuestStep):
            if not scenario.vm.allow_exec:
                yield (*here, "guest"), "needs `allow_exec: true` in vm"
            if step.save is not None:
                if step.save in saved:
                    yield (*here, "save"), f"{step.save!r} is saved by an earlier step"
                saved.add(step.save)
        elif isinstance(step, MeasureStep):
            if step.measure in measured:
                yield (*here, "measure"), f"{step.measure!r} is measured by an earlier step"
            measured.add(step.measure)
        elif isinstance(step, SameStep):
            for place, name in enumerate(step.same):
                if name not in saved:
                    yield (*here, "same", place), f"no earlier step saves {name!r}"
        elif isinstance(step, ExpectStep):
            if step.expect.measure not in measured:
                yield (*here, "expect", "measure"), f"no earlier step measures {step.expect.measure!r}"
            for key, bounds in step.expect.bounds():
                if bounds.of is not None and bounds.of not in measured:
                    yield (*here, "expect", key, "of"), f"no earlier step measures {bounds.of!r}"
        elif isinstance(step, ReclaimStep):
            if running:
                yield (*here, "reclaim"), "an earlier `every` still runs; put `reclaim: stop` before this"
            running = running or step.reclaim.every is not None
        elif isinstance(step, ReclaimStopStep):
            if not running:
                yield (*here, "reclaim"), "no `reclaim` with `every` runs here"
            running = False
        elif isinstance(step, BalloonStep) and not 0 < step.balloon <= scenario.vm.memory:
            yield (*here, "balloon"), f"must be more than nothing and at most {format_size(scenario.vm.memory)}"


def load_scenario(path: Path) -> Scenario:
    """The scenario in a file; its paths absolute.

    :raise ConfigError: naming the file, line and key.
    """
    return strict_yaml.load(path, Scenario).resolved(path.parent)
