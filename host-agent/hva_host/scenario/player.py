"""Plays the steps of a scenario on a running VM.

A step that fails ends the scenario: what follows would measure something else. What a step finds wrong with what was
saved or measured before (``same``, ``expect``) is collected, and the next step is played.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from hva_host.agent.model import EpochStats, Measure, ReclaimResult
from hva_host.load.model import LoadResult
from hva_host.report.model import Outcome, StepRecord
from hva_host.scenario.loads import Loads, shown
from hva_host.scenario.progress import Progress
from hva_host.scenario.seam import PlayedVm
from hva_host.scenario.titles import title_of
from hvaqemu.errors import GuestError, HvaError
from hvaqemu.load_config import LoadExpectStep, LoadStep, LoadStopStep
from hvaqemu.qemu.logs import one_line, printable
from hvaqemu.qemu.race import race
from hvaqemu.scenario_config import (
    BalloonStep,
    ExpectStep,
    GuestStep,
    MeasureStep,
    ReclaimPlan,
    ReclaimStep,
    ReclaimStopStep,
    RestoreStep,
    SameStep,
    Scenario,
    SetStep,
    SleepStep,
    Step,
    verb_of,
)
from hvaqemu.units import MiB, format_duration, format_size

T = TypeVar("T")

#: Bytes of a command's output that are kept; more is refused where the output is saved.
OUTPUT_LIMIT = 1 << 20
#: Seconds an operation of the host agent may take. Generous: each has its own, closer deadlines inside.
MEASURE_SECONDS = 30.0
RECLAIM_SECONDS = 600.0
RESTORE_SECONDS = 600.0
#: Beyond the time that the last requests may take.
LOAD_SECONDS = 120.0
#: Seconds the host agent has, beyond a step's own timeout, to say that the guest did not keep it.
GRACE_SECONDS = 15.0


async def nothing(_vm: PlayedVm) -> None:
    """Nothing is to be done with the VM."""


class Player:
    """One play of one scenario's steps; what came of it is in the attributes, whatever happens."""

    def __init__(
        self,
        vm: PlayedVm,
        scenario: Scenario,
        progress: Progress,
        clock: Callable[[], float],
        on_measure: Callable[[PlayedVm], Awaitable[None]] = nothing,
    ) -> None:
        """:param clock: seconds since the VM started; :param on_measure: awaited with the VM after each measure."""
        self.failures: list[str] = []
        self.measures: dict[str, Measure] = {}
        self.steps: list[StepRecord] = []
        self.epochs: list[EpochStats] = []
        self._saved: dict[str, bytes] = {}
        self._vm = vm
        self._scenario = scenario
        self._progress = progress
        self._clock = clock
        self._on_measure = on_measure
        self._reclaiming = False
        self._loads = Loads(scenario.vm)
        self._verbs: dict[type[Step], Callable[[Any], Coroutine[Any, Any, str]]] = {
            GuestStep: self._guest,
            MeasureStep: self._measure,
            ReclaimStep: self._reclaim,
            ReclaimStopStep: self._reclaim_stop,
            SetStep: self._set,
            RestoreStep: self._restore,
            BalloonStep: self._balloon,
            SleepStep: self._sleep,
            SameStep: self._same,
            ExpectStep: self._expect,
            LoadStep: self._load,
            LoadStopStep: self._load_stop,
            LoadExpectStep: self._load_expect,
        }

    @property
    def saved(self) -> dict[str, str]:
        """Saved outputs as text; bytes that are no UTF-8 as escapes."""
        return {name: output.decode(errors="backslashreplace") for name, output in self._saved.items()}

    @property
    def loads(self) -> dict[str, LoadResult]:
        """Loads that have ended."""
        return self._loads.results

    async def play(self) -> None:
        """Play the steps until one fails. What is wrong is in ``failures``; nothing but cancellation is raised."""
        try:
            for number, step in enumerate(self._scenario.steps, 1):
                if not await self._step(number, step):
                    break
            if self._reclaiming and not self._vm.failure.done():
                await self._end_reclaim()
        except HvaError as error:
            self.failures.append(f"ending the reclaim: {_line(error)}")
        finally:
            await self._loads.kill()
            self._mark_not_run()

    async def _step(self, number: int, step: Step) -> bool:
        """Play one step; False: it failed, and the scenario ends. A failed check is only noted."""
        total = len(self._scenario.steps)
        title = title_of(step)
        begin = self._clock()
        self._progress.step_begins(number, total, title)
        known = len(self.failures)
        figures, go_on, done = "", True, False
        try:
            figures = await self._verbs[type(step)](step)
            done = True
        except HvaError as error:
            go_on = False
            figures = _line(error)
            self.failures.append(f"step {number}, {title}: {figures}")
            done = True
        finally:
            # Also when cancelled: an interrupted step has not held.
            held = done and len(self.failures) == known
            record = StepRecord(
                number=number,
                verb=verb_of(step),
                title=title,
                outcome=Outcome.OK if held else Outcome.FAILED,
                at_s=begin,
                seconds=self._clock() - begin,
                figures=figures if done else "interrupted",
            )
            self.steps.append(record)
            self._progress.step_ended(record, total)
        return go_on

    def _mark_not_run(self) -> None:
        total = len(self._scenario.steps)
        rest = self._scenario.steps[len(self.steps) :]
        if rest:
            one = len(rest) == 1
            self.failures.append(f"{len(rest)} step{' was' if one else 's were'} not run")
        for number, step in enumerate(rest, len(self.steps) + 1):
            record = StepRecord(number=number, verb=verb_of(step), title=title_of(step), outcome=Outcome.NOT_RUN)
            self.steps.append(record)
            self._progress.step_ended(record, total)

    async def _race(self, work: Coroutine[Any, Any, T], timeout: float, what: str) -> T:
        return await race(work, timeout, what, self._vm.failure)

    async def _guest(self, step: GuestStep) -> str:
        work = self._vm.execute(["/bin/sh", "-c", step.guest], timeout=step.timeout, limit=OUTPUT_LIMIT)
        result = await self._race(work, step.timeout + GRACE_SECONDS, "the command")
        output = one_line(printable(result.stdout.decode(errors="replace")).strip(), 1)
        if not result.ok:
            complaint = result.stderr if result.stderr.strip() else result.stdout
            said = one_line(printable(complaint.decode(errors="replace")).strip())
            how = f"exited with status {result.exit_status}"
            if result.timed_out:
                how = f"did not end within {format_duration(step.timeout)}"
            elif result.signal is not None:
                how = f"was killed by signal {result.signal}"
            raise GuestError(f"{how}: {said}" if said else how)
        if step.save is not None:
            if result.truncated:
                raise GuestError(f"printed more than the {format_size(OUTPUT_LIMIT)} that can be saved")
            self._saved[step.save] = result.stdout
        return output

    async def _measure(self, step: MeasureStep) -> str:
        measure = await self._race(self._vm.measure(), MEASURE_SECONDS, "measuring")
        self.measures[step.measure] = measure
        await self._on_measure(self._vm)
        return f"backing {format_size(measure.backing_bytes)}"

    async def _reclaim(self, step: ReclaimStep) -> str:
        plan = step.reclaim
        if plan.every is not None:
            self._vm.start_reclaiming(plan.states, plan.every)
            self._reclaiming = True
            return "runs beside what follows"
        return reclaimed(await self._reclaim_now(plan))

    async def _reclaim_now(self, plan: ReclaimPlan) -> ReclaimResult:
        discarded = 0

        def tell(epoch: EpochStats) -> None:
            nonlocal discarded
            discarded += epoch.discarded
            self._progress.step_goes_on(f"epoch {epoch.number}, {discarded:,} pages discarded")

        work = self._vm.reclaim(plan.states, epochs=plan.epochs, on_epoch=tell)
        result = await self._race(work, RECLAIM_SECONDS, "reclaiming")
        self.epochs.extend(result.epochs)
        return result

    async def _reclaim_stop(self, _step: ReclaimStopStep) -> str:
        return await self._end_reclaim()

    async def _end_reclaim(self) -> str:
        self._reclaiming = False
        result = await self._race(self._vm.stop_reclaiming(), MEASURE_SECONDS, "ending the reclaim")
        self.epochs.extend(result.epochs)
        return reclaimed(result)

    async def _set(self, step: SetStep) -> str:
        self._vm.set_reclaim(step.set)
        return ""

    async def _restore(self, _step: RestoreStep) -> str:
        pages = await self._race(self._vm.restore(), RESTORE_SECONDS, "restoring")
        return f"{pages:,} pages made resident"

    async def _balloon(self, step: BalloonStep) -> str:
        work = self._vm.balloon(step.balloon, step.timeout)
        size = await self._race(work, step.timeout + GRACE_SECONDS, "the balloon")
        return f"the guest has {format_size(size)}"

    async def _sleep(self, step: SleepStep) -> str:
        await self._race(asyncio.sleep(step.sleep), step.sleep + GRACE_SECONDS, "sleeping")
        return ""

    async def _same(self, step: SameStep) -> str:
        first, *rest = step.same
        different = [name for name in rest if self._saved[name] != self._saved[first]]
        if different:
            self.failures.append(f"{' and '.join(different)} is not the same as {first}")
            return f"{' and '.join(different)} differs"
        return f"{' = '.join(step.same)}"

    async def _expect(self, step: ExpectStep) -> str:
        found, broken = [], []
        for name, bounds in step.expect.bounds():
            value = _expected(self.measures[step.expect.measure], name)
            other = _expected(self.measures[bounds.of], name) if bounds.of is not None else None
            violations = list(bounds.violations(value, other))
            broken += violations
            what = name.replace("_", " ")
            self.failures.extend(f"{what} of {step.expect.measure}: {violation}" for violation in violations)
            found.append(bounds.found(value, other))
        return "; ".join(broken or found)

    async def _load(self, step: LoadStep) -> str:
        await self._race(self._loads.begin(step.load), step.load.ready + GRACE_SECONDS, "the service's first answer")
        return "runs beside what follows"

    async def _load_stop(self, _step: LoadStopStep) -> str:
        return shown(await self._race(self._loads.end(), LOAD_SECONDS, "ending the load"))

    async def _load_expect(self, step: LoadExpectStep) -> str:
        broken = list(self._loads.violations(step.expect))
        self.failures.extend(f"load {step.expect.load}: {violation}" for violation in broken)
        return "; ".join(broken or self._loads.found(step.expect))


def _expected(measure: Measure, name: str) -> int:
    """The bytes that a key of ``expect`` bounds."""
    return measure.backing_bytes + (measure.store_bytes if name == "backing_and_store" else 0)


def reclaimed(result: ReclaimResult) -> str:
    """What a reclaim did, in a few words."""
    count = len(result.epochs)
    store = f", store {result.store_after_bytes / MiB:.1f} MiB" if result.store_after_bytes else ""
    return (
        f"{count:,} epoch{'' if count == 1 else 's'}, {result.discarded:,} pages discarded, backing "
        f"{result.backing_before_bytes / MiB:.1f} -> {result.backing_after_bytes / MiB:.1f} MiB{store}"
    )


def _line(error: HvaError) -> str:
    return one_line(printable(str(error)))
