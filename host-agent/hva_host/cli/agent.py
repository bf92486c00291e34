"""``hvaqemu agent``: the host agent's process."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from hva_host.cli.arguments import Subparsers, add_command

_DESCRIPTION = """\
Be the host agent: take care of the VMs of a runtime directory and answer on its control socket,
until Ctrl-C, SIGTERM or `--stop`. VMs outlive it; the next one takes them over. There is seldom a
need to start it by hand: commands that need one start it in the background, where it logs to
agent.log in the runtime directory.
"""
_EXAMPLES = """
hvaqemu agent
hvaqemu agent --stop
qmp-shell /run/hvaqemu/control.sock
"""


def add_parser(subparsers: Subparsers) -> None:
    parser = add_command(subparsers, "agent", "be the host agent, in the foreground", _DESCRIPTION, _EXAMPLES)
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--stop", action="store_true", help="end the host agent that runs; VMs go on")
    either.add_argument("--background", action="store_true", help=argparse.SUPPRESS)


def run(options: argparse.Namespace) -> int:
    from hvaqemu.paths import runtime_dir

    runtime = runtime_dir()
    if options.stop:
        return _stop(runtime)
    return _in_background(runtime) if options.background else _serve(runtime)


def _serve(runtime: Path) -> int:
    import asyncio

    from hva_host.agent.service import serve
    from hva_host.cli.output import progress

    _log()
    asyncio.run(serve(runtime, lambda path: progress(f"hvaqemu: the host agent, process {os.getpid()}, serves {path}")))
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


def _log() -> None:
    import logging

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    # Of what the library says of itself only complaints are of use here.
    logging.getLogger("qemu.qmp").setLevel(logging.WARNING)
