"""The console script ``hvaqemu``: finds the subcommand, turns what it raises into lines and exit codes."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType

from hva_host.cli.loop import Interrupted
from hva_host.cli.text import one_line
from hvaqemu import __version__
from hvaqemu.errors import HvaError

EXPECTED, BUG = 1, 2

_COMMANDS = (
    "doctor",
    "image",
    "run",
    "compare",
    "up",
    "down",
    "ls",
    "top",
    "status",
    "reclaim",
    "set",
    "freeze",
    "merge",
    "restore",
    "resume",
    "exec",
    "qmp",
    "console",
    "events",
    "report",
    "agent",
)
_DESCRIPTION = """\
Gives a host back the memory its QEMU guests do not need, and every byte back to the guest on access.
"""
_EPILOG = """\
a first look:
  hvaqemu doctor                            is this host fit for it?
  hvaqemu run examples/quickstart.yaml      boot a guest, reclaim, check that nothing changed

a VM that stays:
  hvaqemu up examples/vm.yaml
  hvaqemu reclaim NAME
  hvaqemu status NAME
  hvaqemu down NAME

exit codes: 0 it worked, 1 it did not and one line on stderr says why, 2 wrong usage or a bug
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hvaqemu",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"hvaqemu {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command", required=True)
    for name in _COMMANDS:
        _module(name).add_parser(subparsers)
    return parser


def _module(name: str) -> ModuleType:
    return import_module(f"hva_host.cli.{name}")


def _split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """``argv`` before and after its first "--": what follows is the guest's, word for word.

    argparse would take a further "--" out of it.
    """
    words = list(argv)
    if not words or words[0] != "exec" or "--" not in words:
        return words, []
    at = words.index("--")
    return words[:at], words[at + 1 :]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; its exit code."""
    words, tail = _split(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        # What the terminal's encoding lacks must not end us.
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    options = _parser().parse_args(words)
    options.tail = tail
    try:
        code = int(_module(options.command).run(options))
        sys.stdout.flush()
    except HvaError as error:
        print(f"hvaqemu: {one_line(str(error))}", file=sys.stderr)
        return EXPECTED
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except Interrupted as interrupted:
        return 128 + interrupted.number
    except BrokenPipeError:
        # Who read our output has gone, as `head` does; the interpreter would complain when it flushes at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except Exception:
        import traceback

        traceback.print_exc()
        print("hvaqemu: this is a bug of hvaqemu; please report the lines above", file=sys.stderr)
        return BUG
    return code


if __name__ == "__main__":
    sys.exit(main())
