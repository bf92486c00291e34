"""Runs other programs: with a deadline, in a process group that always ends, and with their last words in the error."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import IO

from hvaqemu.errors import DeadlineExceeded, HostError

#: The Debian package of each program, for the hint.
_PACKAGE = {
    "mmdebstrap": "mmdebstrap",
    "dpkg-deb": "dpkg",
    "update-alternatives": "dpkg",
    "setpriv": "util-linux",
    "mke2fs": "e2fsprogs",
    "debugfs": "e2fsprogs",
    "e2fsck": "e2fsprogs",
    "qemu-system-s390x": "qemu-system-misc",
}
#: Where Debian keeps programs that an ordinary user's PATH leaves out.
_MORE_PATH = "/usr/sbin:/sbin"
_TAIL_LINES = 40
_NO_ROOM = re.compile(r"No space left on device|Disk quota exceeded|You don't have enough free space", re.IGNORECASE)


def find_tool(name: str) -> str:
    """The path of program ``name``.

    :raise HostError: it is not installed.
    """
    found = shutil.which(name) or shutil.which(name, path=_MORE_PATH)
    if found is None:
        raise HostError(f"{name} is not installed", f"apt install {_PACKAGE.get(name, name)}")
    return found


def run(
    argv: Sequence[str],
    *,
    what: str,
    deadline: float,
    env: Mapping[str, str] | None = None,
    stdin: bytes | None = None,
    on_line: Callable[[str], None] | None = None,
    console: bool = False,
) -> bytes:
    """Run ``argv`` to its end and return what it wrote to stdout.

    :param what: what it is for, as an error begins ("making the file system").
    :param deadline: seconds it may take.
    :param env: variables set on top of this process's own.
    :param on_line: is told each line of its stderr as it comes.
    :param console: take its stdout for a console: it is followed together with stderr, and nothing is returned.
    :raise HostError: it is not installed, or failed; the message carries the line of its stderr that says why.
    :raise DeadlineExceeded: it took longer than ``deadline``.
    """
    # It must not go on when this process is killed.
    command = [find_tool("setpriv"), "--pdeathsig", "KILL", "--", find_tool(argv[0]), *argv[1:]]
    tail: deque[str] = deque(maxlen=_TAIL_LINES)
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL if stdin is None else subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT if console else subprocess.PIPE,
        env={**os.environ, "LC_ALL": "C.UTF-8", **(env or {})},
        # What it makes, compiled modules of the image among it, must not depend on who builds it.
        umask=0o022,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        out: list[bytes] = []
        workers = [threading.Thread(target=_follow, args=(process.stderr or process.stdout, tail, on_line))]
        if process.stderr is not None:
            workers.append(threading.Thread(target=_collect, args=(process.stdout, out)))
        if process.stdin is not None:
            workers.append(threading.Thread(target=_feed, args=(process.stdin, stdin or b"")))
        for worker in workers:
            worker.start()
        try:
            process.wait(deadline)
        except subprocess.TimeoutExpired as error:
            raise DeadlineExceeded(f"{what}: {argv[0]} took longer than {deadline:.0f} s") from error
        finally:
            # Its children must not outlive it, whichever way it ended; and they hold the pipes the threads read.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            for worker in workers:
                worker.join()
    if process.returncode != 0:
        raise HostError(f"{what}: {_reason(argv[0], process.returncode, tail)}")
    return b"".join(out)


def _reason(name: str, status: int, tail: Sequence[str]) -> str:
    """The line of ``tail`` that says why, else the last one."""
    if any(_NO_ROOM.search(line) for line in tail):
        return f"{name}: no space left on device"
    spoken = [line for line in tail if line.strip()]
    errors = [line for line in spoken if line.startswith(("E:", "error", f"{name}: ")) and "failed: E:" not in line]
    chosen = (errors or spoken or [f"ended with status {status}"])[0 if errors else -1]
    text = chosen.strip().removeprefix(f"{name}: ").removeprefix("E: ")
    return f"{name}: {''.join(letter if letter.isprintable() else '?' for letter in text)[:300]}"


def _collect(stream: IO[bytes], into: list[bytes]) -> None:
    into.append(stream.read())


def _feed(stream: IO[bytes], data: bytes) -> None:
    # It may end without reading all of it; its exit status tells whether that matters.
    with contextlib.suppress(BrokenPipeError), stream:
        stream.write(data)


def _follow(stream: IO[bytes], tail: deque[str], on_line: Callable[[str], None] | None) -> None:
    for raw in stream:
        line = raw.decode(errors="replace").rstrip()
        tail.append(line)
        if on_line is not None:
            on_line(line)
