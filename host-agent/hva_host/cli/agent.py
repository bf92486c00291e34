"""``hvaqemu agent``: the host agent's process."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from hva_host.cli.arguments import Subparsers, add_command

if TYPE_CHECKING:
    from hvaqemu.fleet_config import MetricsConfig

_DESCRIPTION = """\
Be the host agent: take care of the VMs of a runtime directory and answer on its control socket,
until Ctrl-C, SIGTERM or `--stop`. VMs outlive it; the next one takes them over. There is seldom a
need to start it by hand: commands that need one start it in the background, where it logs to
agent.log in the runtime directory.

With --config it starts the VMs of a fleet file and keeps to the limits in there, also after it was
ended and another was started: the file is remembered until --no-config. SIGHUP (or --reload) has
it read the file again: what is new is started, changes of `reclaim` are taken up without touching
guests, VMs that are no longer named are left alone.
"""
_EXAMPLES = """
hvaqemu agent
hvaqemu agent --config fleet.yaml
hvaqemu agent --reload
hvaqemu agent --metrics 127.0.0.1:9777
hvaqemu agent --stop
qmp-shell /run/hvaqemu/control.sock
"""


def add_parser(subparsers: Subparsers) -> None:
    parser = add_command(subparsers, "agent", "be the host agent, in the foreground", _DESCRIPTION, _EXAMPLES)
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--stop", action="store_true", help="end the host agent that runs; VMs go on")
    either.add_argument("--reload", action="store_true", help="have the one that runs read its fleet file again")
    either.add_argument("--config", type=Path, metavar="FILE", help="the fleet: host budget, defaults and VMs")
    either.add_argument("--no-config", action="store_true", help="go on without the fleet file that is remembered")
    parser.add_argument(
        "--metrics",
        metavar="WHERE",
        help="serve metrics to Prometheus at a loopback address (127.0.0.1:9777) or a unix socket (unix:PATH)",
    )
    parser.add_argument("--metrics-anywhere", action="store_true", help="allow an address that others can reach")
    either.add_argument("--background", action="store_true", help=argparse.SUPPRESS)


def run(options: argparse.Namespace) -> int:
    from hvaqemu.paths import runtime_dir

    runtime = runtime_dir()
    if options.stop:
        return _stop(runtime)
    if options.reload:
        return _reload(runtime)
    if options.background:
        return _in_background(runtime)
    return _serve(runtime, options.config, options.no_config, _metrics(options))


def _metrics(options: argparse.Namespace) -> MetricsConfig | None:
    """:raise ConfigError: the address is not one to serve metrics at."""
    from pydantic import ValidationError

    from hvaqemu.errors import ConfigError
    from hvaqemu.fleet_config import MetricsConfig

    if options.metrics is None:
        return None
    try:
        return MetricsConfig(listen=options.metrics, anywhere=options.metrics_anywhere)
    except ValidationError as error:
        what = error.errors(include_url=False)[0]["msg"].removeprefix("Value error, ")
        raise ConfigError(f"--metrics {options.metrics}: {what}".replace("`anywhere`", "--metrics-anywhere")) from error


def _serve(runtime: Path, fleet_file: Path | None, forget: bool, metrics: MetricsConfig | None) -> int:
    import asyncio

    from hva_host.agent.service import serve
    from hva_host.cli.output import progress

    def ready(path: Path) -> None:
        where = f", metrics at {metrics.listen}" if metrics is not None else ""
        progress(f"hvaqemu: the host agent, process {os.getpid()}, serves {path}{where}")

    _log()
    asyncio.run(serve(runtime, ready, fleet_file=fleet_file, forget_fleet_file=forget, metrics=metrics))
    return 0


def _in_background(runtime: Path) -> int:
    """Tell who started us, through our standard output, when we are ready; then have none."""
    import asyncio

    from hva_host.agent.background import LOG_FILE, READY, TAKEN
    from hva_host.agent.service import AlreadyServed, serve

    # A descriptor that what we start does not inherit: its end must mean ours.
    starter = os.dup(1)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.close(null)

    def ready(_path: Path) -> None:
        os.write(starter, READY)
        os.close(starter)

    _log()
    try:
        asyncio.run(serve(runtime, ready, runtime / LOG_FILE))
    except AlreadyServed:
        os.write(starter, TAKEN)
        return 1
    return 0


def _stop(runtime: Path) -> int:
    from hva_host.agent.client import ControlClient, NotServed
    from hva_host.agent.control import CONTROL_SOCKET
    from hva_host.cli.loop import run_async
    from hva_host.cli.output import progress

    async def quit() -> str:
        try:
            client = await ControlClient.connect(runtime / CONTROL_SOCKET, 10.0)
        except NotServed:
            return "no host agent runs"
        try:
            await client.quit()
        finally:
            await client.close()
        return "the host agent ends; its VMs go on"

    progress(run_async(quit()))
    return 0


def _reload(runtime: Path) -> int:
    from hva_host.agent.client import ControlClient
    from hva_host.agent.control import CONTROL_SOCKET
    from hva_host.cli.loop import run_async

    async def reload() -> None:
        client = await ControlClient.connect(runtime / CONTROL_SOCKET, 10.0)
        try:
            await client.reload()
        finally:
            await client.close()

    run_async(reload())
    return 0


def _log() -> None:
    import logging

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    # Of what the library says of itself only complaints are of use here.
    logging.getLogger("qemu.qmp").setLevel(logging.WARNING)
