"""``python3 agent.pyz [--port NAME] [--allow-exec]``: run the guest agent until SIGTERM. Needs root for page flags."""

from __future__ import annotations

import argparse
import sys

from hva_guest.agent import Agent, Settings
from hvaqemu import __version__
from hvaqemu.protocol import PORT_NAME


def log(text: str) -> None:
    """A line for the console."""
    sys.stderr.write(f"hva-guest: {text}\n")
    sys.stderr.flush()


def main(argv: list[str] | None = None) -> int:
    """Run with ``argv`` (None: the process's arguments); the exit status."""
    parser = argparse.ArgumentParser(
        prog="hva-guest", description="Reports the states of this guest's pages to its host."
    )
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("--port", default=PORT_NAME, help="name of the virtio-serial port (default: %(default)s)")
    parser.add_argument(
        "--allow-exec", action="store_true", help="let the host run commands in this guest, as this user"
    )
    # For running the agent where there is no virtio port or no root: other files in place of the kernel's.
    parser.add_argument("--device", default="", help=argparse.SUPPRESS)
    parser.add_argument("--kpageflags", default="/proc/kpageflags", help=argparse.SUPPRESS)
    parser.add_argument("--iomem", default="/proc/iomem", help=argparse.SUPPRESS)
    chosen = parser.parse_args(argv)
    settings = Settings(chosen.port, chosen.device, chosen.allow_exec, chosen.kpageflags, chosen.iomem)
    Agent(settings, log).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
