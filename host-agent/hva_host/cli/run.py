"""``hvaqemu run``: play a scenario."""

from __future__ import annotations

import argparse
import signal
from pathlib import Path

from hva_host.cli.arguments import Subparsers, add_command

_DESCRIPTION = """\
Play a scenario: start its VM, play its steps, check what it expects, report, shut down. The VM lives
in this command and ends with it, whatever happens, unless --keep is given. Exit code 0 only if every
step and every expectation held.
"""
_EXAMPLES = """
hvaqemu run examples/quickstart.yaml
hvaqemu run examples/quickstart.yaml --json result.json --report report/
hvaqemu run examples/quickstart.yaml --dry-run
"""


def add_parser(subparsers: Subparsers) -> None:
    parser = add_command(subparsers, "run", "play a scenario and check what it expects", _DESCRIPTION, _EXAMPLES)
    parser.add_argument("file", metavar="SCENARIO.yaml", type=Path, help="a VM and the steps to play on it")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the report as JSON; - is standard output")
    parser.add_argument(
        "--report", metavar="DIR", type=Path, help="write report.html, report.json, report.txt and timeline.png there"
    )
    parser.add_argument("--keep", action="store_true", help="leave the VM running; `hvaqemu down` ends it")
    parser.add_argument("--dry-run", action="store_true", help="print QEMU's command line and start nothing")


def run(options: argparse.Namespace) -> int:
    from hvaqemu.scenario_config import load_scenario

    scenario = load_scenario(options.file)
    if options.dry_run:
        import shlex

        from hva_host.agent.fleet import prepare_command

        print(shlex.join(prepare_command(scenario.vm)))
        return 0

    from hva_host.cli.output import checked_json, print_json

    to_stdout = checked_json(options.json)

    import asyncio
    import json

    from rich.console import Console

    from hva_host.report.files import report_json, write_json
    from hva_host.report.live import LiveProgress
    from hva_host.report.table import render
    from hva_host.scenario.runner import run_scenario

    console = Console(highlight=False, stderr=to_stdout)
    with LiveProgress(console) as progress:
        report = asyncio.run(
            run_scenario(scenario, source=options.file, report_dir=options.report, keep=options.keep, progress=progress)
        )
    console.print(render(report, console.width))
    if to_stdout:
        # Once more through our own printer: it holds outputs of the guest.
        print_json(json.loads(report_json(report)))
    elif options.json is not None:
        write_json(report, options.json)
    if report.interrupted:
        return 128 + signal.Signals[report.interrupted]
    return 0 if report.ok else 1
