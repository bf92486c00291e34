"""The parent that pagers are forked from: ``python -m hva_host.pager.parent --control FD``.

A bare interpreter with numpy has 24 MiB of memory of its own and takes a third of a second to start. A pager forked
from a process that has imported everything shares that memory and is there in milliseconds, which is what a guest waits
for when a pager was killed. Layer indexes are loaded in here too, so all pagers share one copy.

It is asked over a SOCK_SEQPACKET socket, one JSON message with two descriptors (a listening socket, a log) for a pager:
``{"pid": QEMU, "layers": [[IMAGE, INDEX]…]}``; it answers ``{"pid": PAGER}`` with a pidfd, or ``{"error": TEXT}``. It
ends when the other end hangs up; the pagers go on.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import signal
import socket
import sys
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

# np.unique imports it when it is first called: in a pager that is 3 MiB of its own, and a wait for whoever faults.
import numpy.ma  # noqa: F401

from hva_host.memory.native import load_native
from hva_host.memory.preloaded import preload
from hva_host.memory.syscalls import name_process
from hva_host.pager.main import serve
from hvaqemu.faultpoints import reach

REQUEST_MAX = 1 << 18


def main(arguments: list[str] | None = None) -> int:
    """Fork pagers until nobody asks any more."""
    parser = argparse.ArgumentParser(prog="hva-pagers", description=__doc__)
    parser.add_argument("--control", type=int, required=True, help="descriptor of a SOCK_SEQPACKET socket")
    control = socket.socket(fileno=parser.parse_args(arguments).control)
    name_process("hva-pagers")
    # Ctrl-C in the terminal of an embedded host agent is for the host agent.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, _reap)
    load_native()
    gc.collect()
    gc.freeze()
    while True:
        try:
            data, descriptors, _, _ = socket.recv_fds(control, REQUEST_MAX, 2)
        except OSError:
            return 0
        if not data:
            return 0
        try:
            _answer(control, json.loads(data), descriptors)
        except OSError as error:
            with suppress(OSError):
                control.send(json.dumps({"error": f"a pager can not be forked: {error.strerror}"}).encode())
        finally:
            for descriptor in descriptors:
                os.close(descriptor)


def _answer(control: socket.socket, request: dict[str, Any], descriptors: list[int]) -> None:
    layers = [(Path(image), Path(index)) for image, index in request["layers"]]
    for _, index in layers:
        preload(index)
    reach("pager.parent.fork")
    # Held off until the pidfd is open: a child that is reaped before could not be opened any more.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    try:
        pid = os.fork()
        if pid == 0:
            _be_pager(control, int(request["pid"]), layers, *descriptors)
        pidfd = os.pidfd_open(pid)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
    try:
        socket.send_fds(control, [json.dumps({"pid": pid}).encode()], [pidfd])
    finally:
        os.close(pidfd)


def _be_pager(control: socket.socket, qemu: int, layers: list[tuple[Path, Path]], listener: int, log: int) -> None:
    """The child's whole life; never returns, so nothing of the parent's is ever undone in it."""
    status = 2
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
        control.close()
        os.setsid()
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.close(log)
        status = serve(qemu, socket.socket(fileno=listener), layers)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def _reap(_number: int, _frame: object) -> None:
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


if __name__ == "__main__":
    sys.exit(main())
