"""``hvaqemu exec``: run a command in a guest."""

from __future__ import annotations

import argparse
import sys

from hva_host.cli.arguments import Subparsers, add_command, add_json, add_name, duration

TIMED_OUT = 124
_DESCRIPTION = """\
Run a command in the guest as root, through the guest's agent, and wait for its end. Only for VMs
whose file says `allow_exec: true`. Its exit status becomes ours (128 + the number if a signal ended
it, 124 if it was not done in time); at most 1 MiB of its output is kept. On a terminal control
characters of the guest are shown, not obeyed; into a pipe or file its output goes unchanged.
"""
_EXAMPLES = """
hvaqemu exec quickstart -- free -m
hvaqemu exec quickstart --timeout 5m -- sh -c 'md5sum /usr/bin/*'
hvaqemu exec quickstart --stdin -- tee /etc/motd < motd
"""


def add_parser(subparsers: Subparsers) -> None:
    parser = add_command(subparsers, "exec", "run a command in a guest", _DESCRIPTION, _EXAMPLES)
    add_name(parser)
    parser.add_argument("words", metavar="-- CMD", nargs="*", help="the command and its arguments; no shell")
    parser.add_argument("--timeout", metavar="TIME", type=duration, default=60.0, help="when to kill it (default: 60s)")
    parser.add_argument("--stdin", action="store_true", help="give it our standard input, up to 64 KiB")
    add_json(parser)
    parser.set_defaults(complain=parser.error)


def run(options: argparse.Namespace) -> int:
    argv = [*options.words, *options.tail]
    if not argv:
        options.complain(f"what is to be run? for example: hvaqemu exec {options.name} -- uname -a")

    from hva_host.cli.output import print_json, progress
    from hva_host.cli.session import with_agent
    from hva_host.cli.text import write
    from hvaqemu.units import format_duration

    stdin = _stdin() if options.stdin else b""
    result = with_agent(lambda client: client.run(options.name, argv, options.timeout, stdin))
    if options.json:
        print_json(result.model_dump(mode="json"))
    else:
        write(result.stdout)
        write(result.stderr, error=True)
    if result.truncated:
        progress("hvaqemu: the command wrote more than is kept; the rest of its output is lost")
    if result.timed_out:
        progress(f"hvaqemu: the command was not done after {format_duration(options.timeout)} and was killed")
        return TIMED_OUT
    if result.signal is not None:
        progress(f"hvaqemu: the command was ended by signal {result.signal}")
        return 128 + result.signal
    return result.exit_status if result.exit_status is not None else 1


def _stdin() -> bytes:
    from hvaqemu.errors import ConfigError
    from hvaqemu.protocol import STDIN_BYTES_MAX

    data = sys.stdin.buffer.read(STDIN_BYTES_MAX + 1)
    if len(data) > STDIN_BYTES_MAX:
        raise ConfigError(f"standard input: more than {STDIN_BYTES_MAX} bytes", "put it into the image, or send less")
    return data
