"""The life of one pager process, from attaching to QEMU's end."""

from __future__ import annotations

import argparse
import gc
import resource
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from hva_host.memory.syscalls import lock_memory, name_process
from hva_host.pager.loop import Pager
from hvaqemu.errors import HvaError, PeerLost

#: What tools show a pager as.
PROCESS_NAME = "hva-pager"


def serve(pid: int, listener: socket.socket, layers: Sequence[tuple[Path, Path]]) -> int:
    """Be the pager of a QEMU; exit status 0 once QEMU has ended, 1 if it could not be attached to.

    :param listener: a listening unix socket for host agents.
    :param layers: image and index of each layer that pages may depend on.
    """
    try:
        name_process(PROCESS_NAME)
        pager = Pager(pid, listener, layers)
        _settle()
        pager.run()
    except PeerLost as error:
        sys.stderr.write(f"pager: {error}\n")
        return 0
    except (HvaError, ProcessLookupError) as error:
        sys.stderr.write(f"pager: {error}\n")
        return 1
    return 0


def _settle() -> None:
    """Make the process small to disturb: locked in memory, last for the OOM killer, the collector out of the way."""
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("-1000")
    # Without the right to raise the limit, the limit there is may still do.
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    with suppress(OSError):
        lock_memory()
    # Nothing in here makes cycles that matter, and a collection would touch, and so copy, every inherited object.
    gc.freeze()
    gc.disable()


def main(arguments: list[str] | None = None) -> int:
    """Run a pager of its own, without a parent that forks it: ``python -m hva_host.pager --pid PID --listen FD``."""
    parser = argparse.ArgumentParser(prog="hva-pager", description=__doc__)
    parser.add_argument("--pid", type=int, required=True, help="the QEMU to attach to")
    parser.add_argument("--listen", type=int, required=True, help="descriptor of a listening unix socket")
    options = parser.parse_args(arguments)
    return serve(options.pid, socket.socket(fileno=options.listen), ())
