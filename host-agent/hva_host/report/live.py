"""How a run goes, line by line, on a rich console; with a spinner where a person watches."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.status import Status
from rich.text import Text

from hva_host.report.model import Outcome, StepRecord
from hvaqemu.units import format_duration

_MARKS = {Outcome.OK: ("ok", "green"), Outcome.FAILED: ("FAIL", "bold red"), Outcome.NOT_RUN: ("-", "dim")}


class LiveProgress:
    """Shows a run on ``console``. A context: leaving it takes the spinner away, whatever happened."""

    def __init__(self, console: Console) -> None:
        self._console = console
        # A line that rewrites itself means nothing in a log.
        self._status: Status | None = console.status("") if console.is_terminal else None
        self._step = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self._spin("")

    def say(self, line: str) -> None:
        """A stage outside the steps."""
        self._console.print(Text(line), soft_wrap=True)
        self._spin(line)

    def step_begins(self, number: int, total: int, title: str) -> None:
        """A step begins."""
        self._step = f"{_of(number, total)} {title}"
        self._spin(self._step)

    def step_goes_on(self, figures: str) -> None:
        """What the running step has come to so far."""
        self._spin(f"{self._step}: {figures}")

    def step_ended(self, step: StepRecord, total: int) -> None:
        """One line for the step."""
        self._spin("")
        mark, style = _MARKS[step.outcome]
        line = Text(f"{_of(step.number, total)} ")
        line.append(f"{mark:4} ", style=style)
        seconds = format_duration(step.seconds) if step.at_s is not None else ""
        line.append(f"{step.title:46} {seconds:>9}")
        line.append(f"  {step.figures}" if step.figures else "", style="cyan" if step.outcome is Outcome.OK else style)
        self._console.print(line, soft_wrap=True)

    def _spin(self, line: str) -> None:
        if self._status is None:
            return
        if line:
            self._status.update(Text(line, no_wrap=True, overflow="ellipsis"))
            self._status.start()
        else:
            self._status.stop()


def _of(number: int, total: int) -> str:
    width = len(str(total))
    return f"[{number:{width}}/{total}]"
