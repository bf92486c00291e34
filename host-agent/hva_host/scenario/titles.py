"""A step in a few words."""

from __future__ import annotations

from hvaqemu.load_config import LoadExpectStep, LoadStep, LoadStopStep
from hvaqemu.qemu.logs import printable
from hvaqemu.scenario_config import (
    BalloonStep,
    ExpectStep,
    GuestStep,
    MeasureStep,
    ReclaimStep,
    ReclaimStopStep,
    RestoreStep,
    SameStep,
    SetStep,
    SleepStep,
    Step,
)
from hvaqemu.units import format_duration, format_frequency, format_size

#: Letters; a line of progress stays within 100 with number, duration and short figures.
LONGEST = 46
_WITH_STORE = {"backing": "", "backing_and_store": "with store "}


def title_of(step: Step) -> str:
    """One printable line, at most ``LONGEST`` letters."""
    title = " ".join(printable(_title(step)).split())
    return title if len(title) <= LONGEST else title[: LONGEST - 1] + "…"


def _title(step: Step) -> str:
    match step:
        case GuestStep():
            first, *rest = step.guest.strip().splitlines()
            if first.lstrip().startswith("#"):
                return f"guest: {first.lstrip().lstrip('#').strip()}"
            return f"guest: {first}{' …' if rest else ''}"
        case MeasureStep():
            return f"measure {step.measure}"
        case ReclaimStep():
            states = ", ".join(step.reclaim.states)
            every = step.reclaim.every
            return f"reclaim {states}" if every is None else f"reclaim {states} every {_short(format_duration(every))}"
        case ReclaimStopStep():
            return "reclaim stop"
        case SetStep():
            return f"set reclaim {step.set.mode}"
        case RestoreStep():
            return "restore"
        case BalloonStep():
            return f"balloon {_short(format_size(step.balloon))}"
        case SleepStep():
            return f"sleep {_short(format_duration(step.sleep))}"
        case SameStep():
            return f"same {', '.join(step.same)}"
        case ExpectStep():
            bounds = [f"{_WITH_STORE[name]}{bounds.title}" for name, bounds in step.expect.bounds()]
            return f"expect {step.expect.measure} {' and '.join(bounds)}"
        case LoadStep():
            return f"load {step.load.save}: {format_frequency(step.load.rate)} to {' '.join(step.load.url)}"
        case LoadStopStep():
            return "load stop"
        case LoadExpectStep():
            served = [f"{key} {bounds.title}" for key, bounds in step.expect.bounds()]
            return f"expect {step.expect.load} {' and '.join(served) or 'without errors'}"


def _short(figure: str) -> str:
    # What a user wrote has seldom a fraction.
    return figure.replace(".0 ", " ")
