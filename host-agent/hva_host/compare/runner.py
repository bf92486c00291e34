"""Plays a scenario under one method after the other, each on a VM of its own from the same image."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from hva_host.agent import plan
from hva_host.agent.condition import Listener
from hva_host.agent.fleet import Fleet
from hva_host.agent.journal import journaling
from hva_host.compare.method import Method, Played, played_under, refuse
from hva_host.compare.method_fleet import MethodFleet
from hva_host.compare.model import ComparisonReport, MethodRun
from hva_host.compare.seam import ComparedFleet
from hva_host.scenario.progress import Progress
from hva_host.scenario.runner import run_scenario
from hva_host.scenario.signals import Interruption, interruptible
from hvaqemu.errors import HostError, HvaError
from hvaqemu.paths import runtime_dir
from hvaqemu.qemu.logs import one_line, printable
from hvaqemu.scenario_config import Scenario
from hvaqemu.units import MiB

_WORKS = {True: "works", False: "not working on this guest", None: "not found out whether it works"}


def own_fleet(tell: Listener) -> ComparedFleet:
    """A fleet of this process's own, whose VMs end with it."""
    return Fleet(runtime_dir(), embedded=True, on_event=tell)


class Comparison:
    """What there is of a comparison so far; can be reported at any moment, because any moment may be its last.

    :param source: the file that ``scenario`` was read from.
    :param fleet: makes what launches one VM, and tells of its events.
    """

    def __init__(
        self,
        scenario: Scenario,
        methods: Sequence[Method],
        *,
        source: Path,
        progress: Progress,
        fleet: Callable[[Listener], ComparedFleet] = own_fleet,
    ) -> None:
        self._scenario = scenario
        self._methods = methods
        self._source = source
        self._progress = progress
        self._fleet = fleet
        self._runs: list[MethodRun] = []
        self._interruption: Interruption | None = None
        self._stopped = ""

    def report(self) -> ComparisonReport:
        """The runs that have ended."""
        return ComparisonReport(
            source=str(self._source),
            runs=self._runs,
            interrupted=self._interrupted,
            stopped=self._stopped,
            not_run=list(self._methods[len(self._runs) :]),
        )

    @property
    def _interrupted(self) -> str:
        return self._interruption.name if self._interruption is not None else ""

    async def play(self) -> None:
        """Play the scenario under each method, in their order. SIGINT, SIGTERM and SIGHUP end that in good order.

        :raise ConfigError: the scenario is not fit for it.
        :raise HvaError: the image can not be had.
        """
        refuse(self._scenario, self._methods, self._source)
        work = asyncio.create_task(self._all())
        with interruptible(work) as self._interruption:
            try:
                await work
            except asyncio.CancelledError:
                if not self._interrupted:
                    raise

    async def _all(self) -> None:
        await _warm(self._scenario, self._progress)
        for number, method in enumerate(self._methods, 1):
            self._progress.say(f"method {number} of {len(self._methods)}: {method}")
            try:
                async with journaling() as tell:
                    self._runs.append(await self._run(method, tell))
            except Exception as error:
                self._stopped = f"{method}: a bug: {one_line(printable(repr(error)))}"
                raise
            if self._stopped or self._interrupted:
                break

    async def _run(self, method: Method, tell: Listener) -> MethodRun:
        played = played_under(self._scenario, method)
        for title in played.left_out:
            self._progress.say(f"{method}: left out: {title}")
        launching = MethodFleet(self._fleet(tell), method, self._scenario.vm.reclaim)
        try:
            report = await run_scenario(
                played.scenario,
                source=self._source,
                report_dir=None,
                keep=False,
                progress=self._progress,
                fleet=launching,
                at_end=launching.at_end,
            )
        except HvaError as error:
            # One method that can not be had is a result, and the others can still be compared.
            return _not_launched(played, str(error))
        finally:
            if launching.left:
                self._stopped = f"{method}: its VM {self._scenario.vm.name} could not be ended, and has the name"
        run = MethodRun(
            method=method,
            left_out=list(played.left_out),
            begin=played.begin,
            report=report,
            failures=launching.failures,
            remarks=launching.remarks,
            guest=launching.guest,
            first=launching.first,
            last=launching.last,
            counters=launching.counters,
            oom_kills=launching.oom_kills,
            oom_kills_at_least=launching.oom_kills_at_least,
            probe=launching.probe,
        )
        if run.probe is not None:
            self._progress.say(f"{method}: {_WORKS[run.probe.works]}: {run.probe.why}")
        return run


async def _warm(scenario: Scenario, progress: Progress) -> None:
    """Read the image once: the first method must not be the only one that waits for the host's disk.

    :raise HvaError: there is no image to be had, or it can not be read.
    """
    enough = threading.Event()
    try:
        await asyncio.to_thread(_read_image, scenario, progress, enough)
    finally:
        # A thread is not cancelled, and the process would wait for it.
        enough.set()


def _read_image(scenario: Scenario, progress: Progress, enough: threading.Event) -> None:
    image = plan.image_of(scenario.vm, progress.say)
    try:
        with image.root.open("rb", buffering=0) as file:
            while not enough.is_set() and file.read(16 * MiB):
                pass
    except OSError as error:
        raise HostError(f"{image.root}: {error.strerror}", "the image must be readable") from error


def _not_launched(played: Played, error: str) -> MethodRun:
    return MethodRun(method=played.method, left_out=list(played.left_out), error=one_line(printable(error)))
