"""The methods that are compared, and what each makes of a scenario. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from hva_host.agent.model import Record
from hva_host.scenario.titles import title_of
from hvaqemu.config import BalloonConfig, VmConfig
from hvaqemu.errors import ConfigError
from hvaqemu.reclaim_config import ReclaimConfig, ReclaimMode
from hvaqemu.scenario_config import ReclaimStep, Scenario, SetStep, Step, verb_of


class Method(StrEnum):
    """A way to give a guest's memory back to its host."""

    #: Nothing is done.
    NONE = "none"
    #: QMP ``balloon``, to the size that the guest's own statistics justify.
    BALLOON = "balloon"
    #: The guest's balloon driver tells QEMU of free pages.
    FREE_PAGE_REPORTING = "free-page-reporting"
    HVA = "hva"


class Begin(Record):
    """From when on the scenario has memory given back, the same for every method."""

    #: The first of the played steps that has, counted from 1; None: from the start of the VM.
    step: int | None = None
    #: It goes on beside the guest's commands.
    beside: bool = True


@dataclass(frozen=True)
class Played:
    """A scenario as it is played under a method."""

    method: Method
    scenario: Scenario
    begin: Begin
    #: Titles of the steps that are not played.
    left_out: tuple[str, ...] = ()


def methods_named(text: str) -> tuple[Method, ...]:
    """The methods of a list with commas, in its order.

    :raise ConfigError: one is unknown, or is there twice.
    """
    found: list[Method] = []
    for name in text.split(","):
        if name.strip() not in list(Method):
            raise ConfigError(f"--methods: {name.strip()!r} is not a method", f"known: {', '.join(Method)}")
        method = Method(name.strip())
        if method in found:
            raise ConfigError(f"--methods: {method} is there twice")
        found.append(method)
    return tuple(found)


def goes_on_by_itself(reclaim: ReclaimConfig) -> bool:
    """Whether a VM's memory is reclaimed all the time, without a step that says so."""
    return reclaim.mode not in (ReclaimMode.OFF, ReclaimMode.MANUAL)


def refuse(scenario: Scenario, methods: Sequence[Method], source: Path) -> None:
    """Find before anything is started what would spoil a comparison.

    :raise ConfigError: naming the file and the key.
    """
    vm = scenario.vm
    if not vm.allow_exec:
        raise ConfigError(f"{source}: a comparison asks the guest for its figures", "set allow_exec: true in vm")
    if Method.HVA in methods and vm.balloon.free_page_reporting:
        raise ConfigError(
            f"{source}: vm.balloon.free_page_reporting: hva discards nothing of such a VM",
            "leave it out: the method free-page-reporting turns it on",
        )
    mode = vm.reclaim.mode
    if Method.BALLOON in methods and ReclaimMode.PRESSURE in (mode, *_modes_set(scenario)):
        raise ConfigError(
            f"{source}: reclaim mode pressure: hva acts only while the host is short; this balloon can not know",
            "use mode proactive, or leave balloon out of --methods",
        )
    for number, step in enumerate(scenario.steps, 1):
        if isinstance(step, SetStep):
            mode = step.set.mode
        if Method.HVA in methods and isinstance(step, ReclaimStep) and mode is ReclaimMode.OFF:
            raise ConfigError(
                f"{source}: step {number}, reclaim: hva may not, reclaim is in mode off there",
                "leave the mode out, or set it to manual",
            )


def _modes_set(scenario: Scenario) -> list[ReclaimMode]:
    return [step.set.mode for step in scenario.steps if isinstance(step, SetStep)]


def played_under(scenario: Scenario, method: Method) -> Played:
    """What ``method`` makes of a scenario.

    A ``balloon`` step is for no method: it would be a second one beside. What a scenario expects of its measures, it
    expects of hva; that bytes stay the same is expected of all.
    """
    without = ("balloon",) if method is Method.HVA else ("balloon", "expect")
    steps = tuple(step for step in scenario.steps if verb_of(step) not in without)
    left_out = tuple(title_of(step) for step in scenario.steps if verb_of(step) in without)
    begin = begin_of(scenario.vm.reclaim, steps)
    played = scenario.model_copy(update={"vm": _config(scenario.vm, method), "steps": steps})
    return Played(method, played, begin, left_out)


def begin_of(reclaim: ReclaimConfig, steps: Sequence[Step]) -> Begin:
    """From when on memory is given back, where ``reclaim`` and ``steps`` say so; from the start where neither does."""
    if goes_on_by_itself(reclaim):
        return Begin()
    for number, step in enumerate(steps, 1):
        if isinstance(step, ReclaimStep):
            return Begin(step=number, beside=step.reclaim.every is not None)
        if isinstance(step, SetStep) and goes_on_by_itself(step.set):
            return Begin(step=number)
    return Begin()


def _config(config: VmConfig, method: Method) -> VmConfig:
    # One method's guest must not find what another's has written.
    changes: dict[str, object] = {"keep_disks": False}
    if method is not Method.HVA:
        changes["reclaim"] = ReclaimConfig(mode=ReclaimMode.OFF, min_resident=config.reclaim.min_resident)
        changes["balloon"] = BalloonConfig()
    if method is Method.BALLOON:
        # In its favour: the guest takes memory back where the balloon's manager is too slow, instead of killing.
        changes["balloon"] = BalloonConfig(deflate_on_oom=True)
    if method is Method.FREE_PAGE_REPORTING:
        changes["balloon"] = BalloonConfig(free_page_reporting=True)
    return config.model_copy(update=changes)
