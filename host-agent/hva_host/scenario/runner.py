"""Runs a scenario: launches the VM in this process, plays the steps, shuts down on every way out, reports."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Any

from hva_host.agent import ram_frames
from hva_host.agent.fleet import Fleet
from hva_host.agent.journal import journaling
from hva_host.agent.model import StallStats
from hva_host.agent.versions import ours
from hva_host.report.files import report_folder, write_report
from hva_host.report.model import ScenarioReport
from hva_host.scenario.player import MEASURE_SECONDS, Player, nothing
from hva_host.scenario.progress import Progress
from hva_host.scenario.seam import LaunchingFleet, PlayedVm
from hva_host.scenario.signals import interruptible
from hva_host.scenario.timeline import Timeline
from hvaqemu.errors import HvaError
from hvaqemu.pages import PAGE_SHIFT
from hvaqemu.paths import runtime_dir
from hvaqemu.qemu import logs
from hvaqemu.qemu.race import race
from hvaqemu.scenario_config import Scenario
from hvaqemu.units import format_duration

#: Seconds shutting down may take before the run gives up waiting; the fleet's own soft-hard-loud stop is shorter.
SHUT_DOWN_SECONDS = 90.0
_CONSOLE_LINES = 20


async def run_scenario(
    scenario: Scenario,
    *,
    source: Path,
    report_dir: Path | None,
    keep: bool,
    progress: Progress,
    fleet: LaunchingFleet | None = None,
    at_end: Callable[[PlayedVm], Awaitable[None]] = nothing,
) -> ScenarioReport:
    """Play a scenario on a VM of its own and say what came of it.

    SIGINT, SIGTERM and SIGHUP end it in good order: the report says so and holds what there is.

    :param source: the file it was read from, for the report.
    :param report_dir: where to write the report's files; made where it is missing. None: nowhere.
    :param keep: leave the VM running at the end.
    :param fleet: what launches the VM; None: a fleet of this process's own.
    :param at_end: awaited with the VM after the last step that was played, while it runs; not after a signal.
    :raise HvaError: the VM could not be launched, or ``report_dir`` not be written; no VM is left behind.
    """
    if fleet is None:
        async with journaling() as tell:
            own = Fleet(runtime_dir(), embedded=not keep, on_event=tell)
            return await _run(scenario, source, report_dir, keep, progress, own, at_end)
    return await _run(scenario, source, report_dir, keep, progress, fleet, at_end)


async def _run(
    scenario: Scenario,
    source: Path,
    report_dir: Path | None,
    keep: bool,
    progress: Progress,
    fleet: LaunchingFleet,
    at_end: Callable[[PlayedVm], Awaitable[None]],
) -> ScenarioReport:
    folder = report_folder(report_dir) if report_dir is not None else None
    run = _Run(scenario, keep, progress, fleet, at_end)
    begin = time.monotonic()
    work = asyncio.create_task(run.play())
    with interruptible(work) as interruption:
        try:
            await work
        except asyncio.CancelledError:
            if not interruption.name:
                raise
        finally:
            if not work.done():
                work.cancel()
                with suppress(asyncio.CancelledError, HvaError):
                    await work
            await _to_the_end(run.shut_down())
        # Inside: what was found is not lost to a signal that comes now.
        versions = await _versions(scenario)
    report = run.report(source, interruption.name, time.monotonic() - begin, versions)
    if folder is not None:
        written = write_report(report, folder)
        progress.say(f"wrote {', '.join(map(str, written))}")
    return report


class _Run:
    """What there is of a run so far; complete at any moment, because any moment may be its last."""

    def __init__(
        self,
        scenario: Scenario,
        keep: bool,
        progress: Progress,
        fleet: LaunchingFleet,
        at_end: Callable[[PlayedVm], Awaitable[None]],
    ) -> None:
        self._scenario = scenario
        self._keep = keep
        self._progress = progress
        self._fleet = fleet
        self._at_end = at_end
        self._vm: PlayedVm | None = None
        self._player: Player | None = None
        pages = scenario.vm.memory >> PAGE_SHIFT
        self._timeline = Timeline(frame_interval=ram_frames.seconds_between(pages))
        self._stalls = StallStats()
        self._guest_kernel = ""
        self._launch_s = 0.0
        self._console: list[str] = []
        self._failures: list[str] = []
        self._ended = ""

    async def play(self) -> None:
        """Launch and play.

        :raise HvaError: the VM could not be launched.
        """
        begin = time.monotonic()
        self._vm = vm = await self._fleet.up(self._scenario.vm, self._progress.say)
        self._launch_s = time.monotonic() - begin
        self._progress.say(f"{self._scenario.vm.name}: the guest answers after {format_duration(self._launch_s)}")
        started = time.monotonic()
        with suppress(HvaError):
            first = await race(vm.sample(), MEASURE_SECONDS, "sampling", vm.failure)
            self._timeline.add(first)
            await self._timeline.look(vm)
            started = time.monotonic() - first.at_s
        self._player = Player(
            vm, self._scenario, self._progress, lambda: time.monotonic() - started, self._timeline.look
        )
        sampling = asyncio.create_task(self._timeline.follow(vm))
        try:
            await self._player.play()
            await self._last_look(vm)
            await self._timeline.look(vm)
        finally:
            sampling.cancel()
            with suppress(asyncio.CancelledError):
                await sampling
        await self._at_end(vm)

    async def _last_look(self, vm: PlayedVm) -> None:
        with suppress(HvaError):
            status = await race(vm.status(), MEASURE_SECONDS, "status", vm.failure)
            self._stalls, self._guest_kernel = status.stalls, status.guest_kernel

    async def shut_down(self) -> None:
        """End the VM, if it was launched and is not to be kept, and all else this process runs for it."""
        name = self._scenario.vm.name
        if self._vm is not None:
            failed = self._player is None or bool(self._player.failures)
            if failed or self._vm.failure.done():
                self._console = logs.tail(self._vm.console_log).splitlines()[-_CONSOLE_LINES:]
            if self._keep:
                self._ended = "kept"
                self._progress.say(f"{name} goes on; end it with: hvaqemu down {name}")
            else:
                self._progress.say(f"shutting {name} down")
                await self._ending(self._down(name), f"shutting {name} down")
        await self._ending(self._fleet.close(), "closing the host agent")

    async def _down(self, name: str) -> None:
        self._ended = await self._fleet.down(name)

    async def _ending(self, work: Coroutine[Any, Any, None], what: str) -> None:
        try:
            await race(work, SHUT_DOWN_SECONDS, what)
        except HvaError as error:
            self._failures.append(f"{what}: {logs.one_line(logs.printable(str(error)))}")

    def report(self, source: Path, interrupted: str, seconds: float, versions: dict[str, str]) -> ScenarioReport:
        """All of it, in one value."""
        player = self._player
        failures = [f"interrupted by {interrupted}"] if interrupted else []
        failures += [*(player.failures if player is not None else []), *self._failures]
        if self._guest_kernel:
            versions = {**versions, "guest kernel": logs.one_line(logs.printable(self._guest_kernel), 1)}
        return ScenarioReport(
            failures=failures,
            interrupted=interrupted,
            saved=player.saved if player is not None else {},
            measures=player.measures if player is not None else {},
            steps=player.steps if player is not None else [],
            loads=player.loads if player is not None else {},
            epochs=player.epochs if player is not None else [],
            stalls=self._stalls,
            launch_s=self._launch_s,
            total_s=seconds,
            ended=self._ended,
            configuration={"source": str(source), "scenario": self._scenario.model_dump(mode="json")},
            versions=versions,
            console_tail=self._console,
            timeline=self._timeline.samples,
            ram=self._timeline.frames,
        )


async def _to_the_end(work: Coroutine[Any, Any, None]) -> None:
    """Await ``work`` even while being cancelled; it has its own deadlines. The cancellation is raised afterwards."""
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError as error:
            cancelled = error
    task.result()
    if cancelled is not None:
        raise cancelled


async def _versions(scenario: Scenario) -> dict[str, str]:
    versions = ours()
    with suppress(OSError, HvaError):
        versions["QEMU"] = await race(_qemu_version(scenario.vm.profile.binary), 10.0, "QEMU's version")
    return versions


async def _qemu_version(binary: str) -> str:
    process = await asyncio.create_subprocess_exec(
        binary, "--version", stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE
    )
    try:
        output, _ = await process.communicate()
    except asyncio.CancelledError:
        process.kill()
        await process.wait()
        raise
    first = logs.printable(output.decode(errors="replace")).partition("\n")[0]
    return first.removeprefix("QEMU emulator version ")
