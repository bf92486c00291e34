"""``hvaqemu compare``: play a scenario under several methods."""

from __future__ import annotations

import argparse
import signal
from pathlib import Path
from typing import TYPE_CHECKING

from hva_host.cli.arguments import Subparsers, add_command

if TYPE_CHECKING:
    from rich.console import Console

    from hva_host.compare.model import ComparisonReport

_DESCRIPTION = """\
Play a scenario under several methods of giving memory back, one after the other, each on a VM of its
own, and show them side by side: none (nothing is given back), balloon (by QMP, to the size that the
guest's own statistics justify, grown back on demand), free-page-reporting (the guest's driver tells
QEMU) and hva. What the scenario reclaims, each does in its way. Exit code 0 only if every method that
works on this guest did all of the scenario's work and kept every byte.
"""
_EXAMPLES = """
hvaqemu compare examples/compare.yaml
hvaqemu compare examples/compare.yaml --methods balloon,hva --report comparison/
hvaqemu compare examples/compare.yaml --json comparison.json
"""


def add_parser(subparsers: Subparsers) -> None:
    parser = add_command(
        subparsers, "compare", "play a scenario under several methods, side by side", _DESCRIPTION, _EXAMPLES
    )
    parser.add_argument("file", metavar="SCENARIO.yaml", type=Path, help="a VM and the steps to play on it")
    parser.add_argument(
        "--methods",
        metavar="LIST",
        default="none,balloon,free-page-reporting,hva",
        help="which, and in which order; default: %(default)s",
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="write all of it as JSON; - is standard output")
    parser.add_argument(
        "--report", metavar="DIR", type=Path, help="write report.html and comparison.json, .txt and .png there"
    )


def run(options: argparse.Namespace) -> int:
    from hva_host.cli.output import checked_json
    from hva_host.compare.method import methods_named
    from hvaqemu.scenario_config import load_scenario

    scenario, methods = load_scenario(options.file), methods_named(options.methods)
    to_stdout = checked_json(options.json)

    import asyncio

    from rich.console import Console

    from hva_host.compare.runner import Comparison
    from hva_host.report.files import report_folder
    from hva_host.report.live import LiveProgress

    folder = report_folder(options.report) if options.report is not None else None
    console = Console(highlight=False, stderr=to_stdout)
    progress = LiveProgress(console)
    comparison = Comparison(scenario, methods, source=options.file, progress=progress)
    try:
        with progress:
            asyncio.run(comparison.play())
    finally:
        # Also on the way out of a bug: what has been played took minutes.
        report = comparison.report()
        if report.runs:
            _deliver(report, console, None if to_stdout else options.json, folder, to_stdout=to_stdout)
    if report.interrupted:
        return 128 + signal.Signals[report.interrupted]
    return 0 if report.ok else 1


def _deliver(
    report: ComparisonReport, console: Console, json_file: Path | None, folder: Path | None, *, to_stdout: bool
) -> None:
    """Show a comparison and write its files.

    :raise HostError: no room, or not writable.
    """
    from hva_host.cli.output import print_json
    from hva_host.compare.files import comparison_data, write_comparison, write_json
    from hva_host.compare.table import render

    console.print(render(report))
    if to_stdout:
        print_json(comparison_data(report))
    elif json_file is not None:
        write_json(report, json_file)
    if folder is not None:
        written = write_comparison(report, folder)
        console.print(f"wrote {', '.join(map(str, written))}", markup=False, soft_wrap=True)
