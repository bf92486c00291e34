"""``python -m tests.fuzz [--minutes N] [TARGET…]``: fuzz with atheris (the extra ``fuzz``), each target for its share.

Begins with ``tests/fuzz/corpus/TARGET.zip``; what it finds new grows in ``build/fuzz/TARGET``, and what breaks
something is kept beside that as ``TARGET-crash-…``. ``--keep`` then leaves in the repository's corpus the fewest inputs
that reach as much.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.fuzz import inputs

_NAMES = ("host_messages", "guest_session", "guest_agent")
_GROWING = Path("build/fuzz")
#: How a child is told from its parent.
_ONE = "--one"


def main() -> int:
    """The command line; exit status 1 if a target broke."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(_NAMES)} (default: all)")
    parser.add_argument("--minutes", type=float, default=30.0, help="for all targets together (default: %(default)s)")
    parser.add_argument("--keep", action="store_true", help="minimise what was found into the corpus")
    if sys.argv[1:2] == [_ONE]:
        return _fuzz(sys.argv[2], sys.argv[3:])
    chosen = parser.parse_args()
    targets = chosen.targets or _NAMES
    if unknown := set(targets) - set(_NAMES):
        parser.error(f"no target {unknown.pop()}")
    seconds = round(chosen.minutes * 60 / len(targets))
    return max([_run(target, seconds, chosen.keep) for target in targets])


def _run(target: str, seconds: int, keep: bool) -> int:
    """Fuzz one target in a process of its own; libFuzzer ends the process it is in."""
    growing, corpus, fewest = (_GROWING / f"{target}{suffix}" for suffix in ("", "-corpus", "-fewest"))
    for folder in (corpus, fewest):
        shutil.rmtree(folder, ignore_errors=True)
    for folder in (growing, corpus, fewest):
        folder.mkdir(parents=True, exist_ok=True)
    inputs.unpack(target, corpus)
    status = _child(target, f"-max_total_time={seconds}", str(growing), str(corpus))
    if keep and not status:
        status = _child(target, "-merge=1", str(fewest), str(growing), str(corpus))
        if not status:
            inputs.pack(inputs.archive(target), [path.read_bytes() for path in fewest.iterdir()])
    return status


def _child(target: str, *options: str) -> int:
    common = ("-max_len=4096", "-timeout=10", "-rss_limit_mb=1024", "-print_final_stats=1")
    prefix = f"-artifact_prefix={_GROWING}/{target}-"
    command = [sys.executable, "-m", "tests.fuzz", _ONE, target, *common, prefix, *options]
    # libFuzzer ends the process without undoing anything.
    with tempfile.TemporaryDirectory(prefix="hva-fuzz") as folder:
        done = subprocess.run(command, env={**os.environ, "TMPDIR": folder})
    return min(1, abs(done.returncode))


def _fuzz(target: str, options: list[str]) -> int:
    """In the child: instrument our modules as they are imported, and hand over to libFuzzer."""
    import atheris

    with atheris.instrument_imports(include=["hvaqemu", "hva_guest", "hva_host.agent"]):
        from tests.fuzz.targets import TARGETS
    # To minimise, libFuzzer starts itself again by the name it was given.
    again = _GROWING / f"{target}-again"
    again.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m tests.fuzz {_ONE} {target} "$@"\n')
    again.chmod(0o700)
    atheris.Setup([str(again), *options], TARGETS[target])
    atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main())
