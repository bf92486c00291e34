"""The project's error tree: one root, few children, each named after what the caller can do about it.

Every :class:`HvaError` that reaches a command line is the user's to mend: one line and exit code 1. Anything else that
escapes is a bug: a traceback and exit code 2. ``asyncio.CancelledError`` is never wrapped.
"""

from __future__ import annotations


class HvaError(Exception):
    """Root of all errors the project raises on purpose; ``str()`` is one line fit for a terminal.

    :param message: what is wrong, naming the file, key or device.
    :param hint: what to do about it, or "".
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class ConfigError(HvaError):
    """A file or an argument the user wrote is wrong: correct it and call again."""


class HostError(HvaError):
    """This host lacks a permission, a tool, room or a kernel feature: provide it and call again."""


class RefusedError(HvaError):
    """What was asked would not be safe, or is not allowed here; asking again changes nothing."""


class LaunchError(HvaError):
    """QEMU or a pager could not be started; the message carries the log's last lines."""


class PeerLost(HvaError):
    """The other end of a link (QEMU, pager, guest agent, host agent) has gone; it may come back."""


class DeadlineExceeded(HvaError):
    """A peer is there but did not answer in time."""


class GuestError(HvaError):
    """The guest agent answered that it can not do what was asked."""


class ProtocolError(HvaError):
    """A peer sent what the protocol does not allow; the link is not to be trusted further."""
