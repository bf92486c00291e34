"""``python -m tests.soak [--seconds N] [--seed N] [--json FILE]``: exit status 1 if anything was wrong."""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path

from hvaqemu.units import MiB
from tests.soak.outcome import show
from tests.soak.soak import Options, run


def main() -> int:
    """Soak, and print what came of it."""
    parser = argparse.ArgumentParser(prog="soak", description=__doc__)
    parser.add_argument("--seconds", type=float, default=1200.0, help="how long (default: 20 minutes)")
    parser.add_argument("--seed", type=int, help="of the deeds, to repeat a soak (default: another one each time)")
    parser.add_argument("--memory", type=int, default=256, help="MiB of the guest (default: 256)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the outcome too")
    parser.add_argument("--log", type=Path, metavar="FILE", help="where to leave the host agent's log")
    options = parser.parse_args()
    seed = options.seed if options.seed is not None else random.randrange(1 << 32)
    say(f"soak for {options.seconds:.0f} s, seed {seed}")
    outcome = run(Options(options.seconds, seed, options.memory * MiB), say, options.log)
    show(outcome)
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(outcome.model_dump_json(indent=1) + "\n")
    return 0 if outcome.ok else 1


def say(text: str) -> None:
    """A line of progress."""
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
