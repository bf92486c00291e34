"""A soak: one VM whose guest verifies all it does, a user who reclaims all the time, and a killer beside both."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hva_host.agent.model import VmState, VmStatus
from hvaqemu.errors import HvaError
from hvaqemu.units import MiB
from tests.soak.deeds import Target, deeds
from tests.soak.killer import Killer
from tests.soak.outcome import Outcome, by_deed, by_length, worst
from tests.soak.user import User
from tests.vm.board import SERIAL, Board, GapLog
from tests.vm.harness import COMPLAINTS, TREE
from tests.vm.host import Host, own_host
from tests.vm.programs import bundle, start_command

NAME = "soak"
_SETUP_SECONDS = 300.0
_SETTLE_SECONDS = 120.0
#: How long the guest may stand still before something is wrong. Nothing the killer does takes as long.
_STALLED_SECONDS = 60.0
_LOOK_SECONDS = 0.05
_PROGRESS_SECONDS = 10.0
_TRACEBACK = re.compile(r"^Traceback.*?(?=^\S*Error)(?P<error>^.*?$)", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Options:
    """How long (seconds), with which seed, on how large a guest (bytes).

    :ivar most: how long at most, where not enough has come of it by then.
    """

    seconds: float
    seed: int
    memory: int = 256 * MiB
    most: float = 0.0


@dataclass
class Soak:
    """A soak under way.

    :ivar enough: whether what has come of it so far will do.
    """

    options: Options
    host: Host
    say: Callable[[str], None]
    enough: Callable[[Outcome], bool]
    problems: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.board = Board(self.host.folder / "board.raw")
        self.killer = Killer(self.host, self.board)
        self.user = User(self.host, NAME, self.options.seed)
        self._began, self._seconds = time.monotonic(), 0.0
        self._counters: dict[str, Any] = {}
        self._status: VmStatus | None = None
        self._gaps = GapLog()

    async def run(self) -> Outcome:
        """From ``up`` to ``down``."""
        tree = await self._start()
        self._began = time.monotonic()
        user = asyncio.create_task(self.user.work())
        killer = asyncio.create_task(self.killer.work(deeds(self.options.seed), self._going))
        watches = [asyncio.create_task(watch) for watch in (self._watch_guest(), self._watch_logs(), self._progress())]
        everything = [user, killer, *watches]
        try:
            # Whatever ends before the killer has found something wrong.
            await asyncio.wait(everything, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in everything:
                task.cancel()
            await asyncio.wait(everything)
        for task in everything:
            if not task.cancelled() and (error := task.exception()) is not None:
                raise error
        self._seconds = time.monotonic() - self._began
        self.problems += self.user.bugs
        await self._finish(tree)
        return self._outcome()

    def _going(self) -> bool:
        spent = time.monotonic() - self._began
        return spent < self.options.seconds or (spent < self.options.most and not self.enough(self._outcome()))

    async def _start(self) -> str:
        """A VM that churns; the checksum of many files of its image."""
        file = self.host.folder / "vm.yaml"
        file.write_text(
            f"name: {NAME}\nmemory: {self.options.memory}\ncpus: 2\nallow_exec: true\n"
            f"boot_timeout: 240s\nextra_disks: [{{path: {self.board.disk}}}]\n"
        )
        self.say("starting the VM")
        await self.host.command("up", file)
        tree = await self._in_guest(["sh", "-c", TREE])
        self.say("starting the guest's work")
        await self._in_guest(start_command("soak", SERIAL, self.options.seed), bundle())
        await _until(lambda: self.board.beat > 1, _SETUP_SECONDS, "the guest's work begins")
        return tree

    async def _finish(self, tree: str) -> None:
        """Have the guest verify all it still has, compare, end the VM and see that nothing is left."""
        self.say("the guest verifies what it still has")
        try:
            await self._settle()
            if not self.problems:
                self.board.order("end")
                await _until(lambda: self.board.answer().get("state") == "done", _SETTLE_SECONDS, "the guest's end")
                self.problems += self.board.answer()["problems"]
                if await self._in_guest(["sh", "-c", TREE]) != tree:
                    self.problems.append("files of the image have other checksums than before")
                said = (await self._in_guest(["dmesg"])).splitlines()
                self.problems += [f"guest's kernel: {line}" for line in said if COMPLAINTS.search(line)]
            self._counters = await self.host.pager_status(NAME)
            async with self.host.client() as client:
                self._status = status = await client.status(NAME)
            if status.state is not VmState.RUNNING:
                self.problems.append(f"the VM is {status.state}: {status.reason}")
            self.say("ending the VM")
            await self.host.command("down", NAME)
            await self.host.all_gone()
        except (HvaError, TimeoutError, AssertionError) as error:
            self.problems.append(f"{error} [{self._console_tail()}]")

    async def _settle(self) -> None:
        """Wait until host agent, pager and guest agent are all there again."""
        until = time.monotonic() + _SETTLE_SECONDS
        while True:
            try:
                async with self.host.client() as client:
                    if (await client.run(NAME, ["true"], 10.0)).ok:
                        return
            except HvaError as error:
                if time.monotonic() > until:
                    raise TimeoutError(f"nothing works {_SETTLE_SECONDS:g} s after the last deed: {error}") from error
                await asyncio.sleep(0.2)

    async def _in_guest(self, argv: list[str], stdin: bytes = b"") -> str:
        async with self.host.client() as client:
            done = await client.run(NAME, argv, _SETUP_SECONDS, stdin)
        assert done.ok, f"in the guest: {argv}: {done}"
        return done.stdout.decode()

    async def _watch_guest(self) -> None:
        """Ends once something is wrong with the guest."""
        beat, seen = self.board.beat, time.monotonic()
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            answer, now = self.board.answer(), time.monotonic()
            self._gaps.look(answer)
            if answer["problems"]:
                self.problems += answer["problems"]
                return
            if answer["beat"] != beat:
                beat, seen = answer["beat"], now
            elif now - seen > _STALLED_SECONDS:
                self.problems.append(f"the guest stands still for {_STALLED_SECONDS:g} s [{self._console_tail()}]")
                return

    async def _watch_logs(self) -> None:
        """Ends once a process of ours died of a bug. A pager's log lasts until the next one starts."""
        logs = (self.host.runtime / "agent.log", self.host.runtime / "vms" / NAME / "pager.log")
        while True:
            for log in logs:
                try:
                    found = _TRACEBACK.search(log.read_text(errors="replace"))
                except OSError:
                    continue
                if found is not None:
                    self.problems.append(f"{log.name}: {found[0]}")
                    return
            await asyncio.sleep(_LOOK_SECONDS)

    async def _progress(self) -> None:
        while True:
            await asyncio.sleep(_PROGRESS_SECONDS)
            # It may be dead just now.
            with suppress(HvaError):
                self._counters = await self.host.pager_status(NAME)
                async with self.host.client() as client:
                    self._status = await client.status(NAME)
            kills = ", ".join(f"{target} {count}" for target, count in self._kills().items())
            counted = self._counters
            self.say(
                f"{time.monotonic() - self._began:5.0f} s  killed: {kills}; epochs {counted.get('epochs', 0):,}, "
                f"refaults {counted.get('refaults', 0):,}, longest pause {self._longest():.2f} s"
            )

    def _kills(self) -> dict[str, int]:
        signals = self.board.answer().get("signals", {})
        return {
            **{str(target): self.killer.kills[target] for target in Target},
            # Its kills are counted where it is found.
            str(Target.GUEST_AGENT): int(signals.get("9", 0)),
        }

    def _longest(self) -> float:
        return float(self.board.answer().get("pauses", {}).get("longest_s", 0.0))

    def _console_tail(self) -> str:
        try:
            text = (self.host.runtime / "vms" / NAME / "console.log").read_text(errors="replace")
        except OSError:
            return "no console"
        return " | ".join(ascii(line) for line in text.splitlines()[-5:])

    def _outcome(self) -> Outcome:
        answer, status = self.board.answer(), self._status
        gaps = self._gaps.gaps
        return Outcome(
            seed=self.options.seed,
            seconds=self._seconds,
            problems=self.problems,
            kills=self._kills(),
            deeds=by_deed(self.killer.done, gaps),
            epochs=self._counters.get("epochs", 0),
            refaults=self._counters.get("refaults", 0),
            refault_pages=self._counters.get("refault_pages", 0),
            discarded_pages=self._counters.get("discarded_pages", 0),
            pager_restarts=status.pager_restarts if status else 0,
            pager_pause_s=status.pager_pause_s if status else 0.0,
            guest_pause_s=self._longest(),
            guest_gaps=by_length(gaps),
            guest_worst=worst(self.killer.done, gaps, self._began),
            verified=answer.get("rounds", {}),
            commands=dict(self.user.done),
            errors=dict(self.user.errors),
        )


async def _until(condition: Callable[[], bool], seconds: float, what: str) -> None:
    """:raise TimeoutError: it did not come true in time."""
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            raise TimeoutError(f"still waiting after {seconds:g} s: {what}")
        await asyncio.sleep(_LOOK_SECONDS)


def run(
    options: Options,
    say: Callable[[str], None],
    keep: Path | None = None,
    enough: Callable[[Outcome], bool] = lambda _outcome: True,
) -> Outcome:
    """Run a soak; what came of it. Nothing of it is left.

    :param keep: where the host agent's log is to be left, for who wants to know more.
    :param enough: whether what has come of it so far will do.
    """
    with own_host() as host:
        try:
            return _run(Soak(options, host, say, enough).run())
        finally:
            log = host.runtime / "agent.log"
            if keep is not None and log.exists():
                keep.write_bytes(log.read_bytes())


def _run(work: Coroutine[Any, Any, Outcome]) -> Outcome:
    return asyncio.run(work)
