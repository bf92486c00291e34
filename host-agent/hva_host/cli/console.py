"""``hvaqemu console``: what a guest printed on its console."""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING, BinaryIO

from hva_host.cli.arguments import Subparsers, add_command, add_name

if TYPE_CHECKING:
    from hva_host.agent.client import ControlClient
    from hva_host.cli.text import Plain

_FOLLOW_SECONDS = 0.2
_CHUNK = 1 << 16
_DESCRIPTION = """\
Print the log of a VM's console: the kernel's messages and what the guest's init prints. On a
terminal control characters of the guest are shown, not obeyed; into a pipe or file they go unchanged.
"""


def add_parser(subparsers: Subparsers) -> None:
    examples = "hvaqemu console quickstart\nhvaqemu console quickstart --follow"
    parser = add_command(subparsers, "console", "show a VM's console log", _DESCRIPTION, examples)
    add_name(parser)
    parser.add_argument("-f", "--follow", action="store_true", help="go on until the VM has ended, or Ctrl-C")


def run(options: argparse.Namespace) -> int:
    from hva_host.cli.session import with_agent

    async def work(client: ControlClient) -> None:
        await _show(client, options.name, options.follow)

    with_agent(work)
    return 0


async def _show(client: ControlClient, name: str, follow: bool) -> None:
    import asyncio

    from hva_host.agent.model import VmState
    from hva_host.cli.text import Plain
    from hvaqemu.errors import ConfigError, HostError

    path = await client.console(name)
    text = Plain() if sys.stdout.isatty() else None
    try:
        file = path.open("rb")
    except OSError as error:
        raise HostError(f"{path}: {error.strerror}") from error
    with file:
        ended = not follow
        while True:
            # Asked before reading: what the VM wrote before it ended is then read below.
            if follow:
                try:
                    ended = (await client.status(name)).state is VmState.GONE
                except ConfigError:
                    ended = True
            _copy(file, text)
            if ended:
                break
            # A file has no event for "grew" that would work everywhere a runtime directory may be.
            await asyncio.sleep(_FOLLOW_SECONDS)
    if text is not None:
        sys.stdout.write(text.feed(b"", final=True))


def _copy(file: BinaryIO, text: Plain | None) -> None:
    if file.tell() > os.fstat(file.fileno()).st_size:
        # The host agent cut the log, so that a guest can not fill the host with it.
        file.seek(0)
    while data := file.read(_CHUNK):
        if text is not None:
            sys.stdout.write(text.feed(data))
        else:
            sys.stdout.buffer.write(data)
    sys.stdout.flush()
