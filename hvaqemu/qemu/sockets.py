"""Unix sockets by path: for their owner only, and below folders of any length."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hvaqemu.errors import HostError
from hvaqemu.paths import SOCKET_PATH_MAX


@contextmanager
def address_of(path: Path) -> Iterator[str]:
    """An address of at most 107 bytes that means ``path`` while the context is open.

    :raise OSError: ``path``'s folder can not be opened.
    """
    if len(os.fsencode(path)) <= SOCKET_PATH_MAX:
        yield str(path)
        return
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)


def listen(path: Path) -> socket.socket:
    """A socket that listens at ``path``, which only its owner may connect to. A file that is in the way is an error.

    :raise HostError: the socket can not be made.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        # bind(2) gives the file this mode, so it is at no moment open to others.
        os.fchmod(listener.fileno(), 0o600)
        with address_of(path) as address:
            listener.bind(address)
        listener.listen()
    except OSError as error:
        listener.close()
        raise HostError(f"{path}: {error.strerror}", "is another VM using this place?") from error
    return listener
