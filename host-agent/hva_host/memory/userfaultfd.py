"""userfaultfd: every ioctl of the project, returning meanings instead of errnos.

Source for the rules: ioctl_userfaultfd(2), include/uapi/linux/userfaultfd.h, mm/userfaultfd.c. Addresses and lengths
are bytes in the address space that created the descriptor (QEMU's), multiples of the page size.
"""

from __future__ import annotations

import enum
import errno
import fcntl
import os
import struct
from typing import NamedTuple

from hvaqemu.errors import HostError, PeerLost
from hvaqemu.faultpoints import reach

_API = 0xC018AA3F
_REGISTER = 0xC020AA00
_WAKE = 0x8010AA02
_COPY = 0xC028AA03
_ZEROPAGE = 0xC020AA04
_WRITEPROTECT = 0xC018AA06

_UFFD_API = 0xAA
_FEATURE_PAGEFAULT_FLAG_WP = 1 << 0
_FEATURE_MISSING_SHMEM = 1 << 5
_FEATURE_WP_HUGETLBFS_SHMEM = 1 << 12
FEATURES = _FEATURE_PAGEFAULT_FLAG_WP | _FEATURE_MISSING_SHMEM | _FEATURE_WP_HUGETLBFS_SHMEM

_REGISTER_MODE_MISSING = 1 << 0
_REGISTER_MODE_WP = 1 << 1
_WRITEPROTECT_MODE_WP = 1 << 0

_EVENT_PAGEFAULT = 0x12
_PAGEFAULT_FLAG_WP = 1 << 1
_MESSAGE = struct.Struct("=B7xQQI4x")
_BATCH = 64

_api = struct.Struct("=QQQ")
_register = struct.Struct("=QQQQ")
_range = struct.Struct("=QQ")
_copy = struct.Struct("=QQQQq")
_zeropage = struct.Struct("=QQQq")
_writeprotect = struct.Struct("=QQQ")


class Fill(enum.Enum):
    """How a fill ended."""

    #: All of it is there now, and who waited for it was woken.
    FILLED = enum.auto()
    #: The first page was there already; nothing was changed, nobody was woken.
    PRESENT = enum.auto()
    #: The kernel wants the rest again, now or (no memory) a little later.
    AGAIN = enum.auto()
    #: The host has no memory for the page just now.
    NO_MEMORY = enum.auto()
    #: The address space is gone or no longer maps the range.
    GONE = enum.auto()


class FillResult(NamedTuple):
    """How a fill ended and how many bytes of it were filled before that."""

    outcome: Fill
    filled: int


class Fault(NamedTuple):
    """One page fault: the byte address (page-aligned) and whether it is a write to a protected page."""

    address: int
    write_protect: bool


_FILL_ERRORS = {
    errno.EEXIST: Fill.PRESENT,
    errno.EAGAIN: Fill.AGAIN,
    errno.ENOMEM: Fill.NO_MEMORY,
    errno.ENOENT: Fill.GONE,
    errno.ESRCH: Fill.GONE,
}


class Userfaultfd:
    """A userfaultfd of some process, ours or QEMU's.

    :param fd: the descriptor, non-blocking; owned from now on.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd
        os.set_blocking(fd, False)
        self._copy_argument = bytearray(_copy.size)
        self._zero_argument = bytearray(_zeropage.size)

    def close(self) -> None:
        os.close(self.fd)

    def handshake(self) -> None:
        """Agree on features; a descriptor on which that was done before is fine (the kernel answers EINVAL).

        :raise HostError: this kernel lacks a feature.
        """
        try:
            fcntl.ioctl(self.fd, _API, _api.pack(_UFFD_API, FEATURES, 0))
        except OSError as error:
            # The kernel has no way to ask "was it done?": registering afterwards fails if it was not.
            if error.errno != errno.EINVAL:
                raise HostError(f"userfaultfd handshake: {error.strerror}") from error

    def register(self, start: int, length: int) -> None:
        """See missing pages and writes to protected pages of a range; a range registered before is fine.

        :raise HostError: the kernel can not do that for this memory.
        :raise PeerLost: the process is gone.
        """
        mode = _REGISTER_MODE_MISSING | _REGISTER_MODE_WP
        try:
            fcntl.ioctl(self.fd, _REGISTER, _register.pack(start, length, mode, 0))
        except OSError as error:
            if error.errno in (errno.ESRCH, errno.ENOMEM):
                raise PeerLost("the process whose memory is to be registered is gone") from error
            hint = "kernel 5.19 or newer with CONFIG_PTE_MARKER_UFFD_WP is needed; see 'hvaqemu doctor'"
            raise HostError(f"userfaultfd can not watch the guest's RAM: {error.strerror}", hint) from error

    def read(self) -> list[Fault]:
        """The faults waiting to be answered, oldest first, at most 64; none if there are none."""
        try:
            data = os.read(self.fd, _BATCH * _MESSAGE.size)
        except BlockingIOError:
            return []
        return [
            Fault(address & ~0xFFF, bool(flags & _PAGEFAULT_FLAG_WP))
            for event, flags, address, _ in _MESSAGE.iter_unpack(data)
            if event == _EVENT_PAGEFAULT
        ]

    def copy(self, target: int, source: int, length: int) -> FillResult:
        """Fill missing pages at ``target`` from ``source`` (an address in *our* memory) and wake who waits.

        Clears a write protection marker of the range.

        :raise OSError: anything that is not one of the :class:`Fill` meanings.
        """
        argument = self._copy_argument
        _copy.pack_into(argument, 0, target, source, length, 0, 0)
        try:
            reach("uffd.copy")
            fcntl.ioctl(self.fd, _COPY, argument)
        except OSError as error:
            return _fill_error(error, _copy.unpack(argument)[4])
        return FillResult(Fill.FILLED, length)

    def zero(self, target: int, length: int) -> FillResult:
        """Fill missing pages with zeros and wake who waits.

        :raise OSError: as :meth:`copy`.
        """
        argument = self._zero_argument
        _zeropage.pack_into(argument, 0, target, length, 0, 0)
        try:
            reach("uffd.zero")
            fcntl.ioctl(self.fd, _ZEROPAGE, argument)
        except OSError as error:
            return _fill_error(error, _zeropage.unpack(argument)[3])
        return FillResult(Fill.FILLED, length)

    def protect(self, start: int, length: int) -> bool:
        """Stop writes to a range, absent pages of it included; False if the process is gone.

        :raise OSError: the kernel had no memory for page tables (ENOMEM), or a bug.
        """
        return self._write_protect(start, length, _WRITEPROTECT_MODE_WP)

    def unprotect(self, start: int, length: int) -> bool:
        """Let writes to a range through and wake who waits to write; False if the process is gone.

        :raise OSError: a bug.
        """
        return self._write_protect(start, length, 0)

    def wake(self, start: int, length: int) -> bool:
        """Have everyone who waits in a range fault again; False if the process is gone."""
        try:
            fcntl.ioctl(self.fd, _WAKE, _range.pack(start, length))
        except OSError as error:
            if error.errno in (errno.ESRCH, errno.ENOENT):
                return False
            raise
        return True

    def _write_protect(self, start: int, length: int, mode: int) -> bool:
        argument = _writeprotect.pack(start, length, mode)
        while True:
            try:
                reach("uffd.protect" if mode else "uffd.unprotect")
                fcntl.ioctl(self.fd, _WRITEPROTECT, argument)
            except OSError as error:
                # EAGAIN: the mapping is just being changed by QEMU; it is over in a moment.
                if error.errno == errno.EAGAIN:
                    continue
                if error.errno in (errno.ESRCH, errno.ENOENT):
                    return False
                raise
            return True


def _fill_error(error: OSError, reported: int) -> FillResult:
    """The kernel writes the bytes filled, or a negative errno, into the argument before it fails."""
    outcome = _FILL_ERRORS.get(error.errno or 0)
    if outcome is None:
        raise error
    return FillResult(outcome, max(reported, 0))
