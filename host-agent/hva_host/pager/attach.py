"""Attaching to a running QEMU by pid: first attach and re-attach after a crash are the same.

Order: lock the ledger → register → presence: erase entries of present pages → derive what of the store is in use →
unprotect everything → wake everyone (re-delivers what a dead pager had read and not answered) → serve.
"""

from __future__ import annotations

import fcntl
import os

from hva_host.memory.backing import Backing
from hva_host.memory.layers import LayerBetrayed
from hva_host.memory.ledger import LEDGER_NAME, Ledger, recorded_ram
from hva_host.memory.store import Store
from hva_host.memory.store_file import STORE_AT_NAME, STORE_NAME, store_identity
from hva_host.memory.syscalls import pidfd_getfd
from hva_host.memory.userfaultfd import Userfaultfd
from hva_host.pager import refusals
from hva_host.pager.process_files import descriptors, take_file
from hva_host.pager.ram import Ram
from hva_host.pager.sources import Sources
from hvaqemu.errors import HostError, PeerLost, RefusedError
from hvaqemu.faultpoints import reach
from hvaqemu.pages import PAGE_SHIFT, Run

_UFFD = "anon_inode:[userfaultfd]"
_LEDGER = f"/memfd:{LEDGER_NAME} (deleted)"
_STORE = f"/memfd:{STORE_NAME} (deleted)"
_STORE_AT = f"/memfd:{STORE_AT_NAME} (deleted)"
#: The descriptor of a guest's RAM in the table of its QEMU.
RAM_LINK = "/memfd:memory-backend-memfd (deleted)"


def attach(pid: int, pidfd: int, sources: Sources) -> Ram:
    """Take charge of a QEMU's RAM.

    :param sources: finds the layers that pages depend on.
    :raise RefusedError: another pager serves it, or its RAM is not of a kind that can be paged.
    :raise HostError: not permitted, or the host has no memory for the ledger.
    :raise PeerLost: it is gone.
    """
    links = descriptors(pid)
    ledger_fd = _take(pidfd, links, _LEDGER, f"process {pid} has no ledger: it runs without the shim")
    store_fd, on_disk = _take_store(pid, pidfd, links)
    ram_fd = _take(pidfd, links, RAM_LINK, f"process {pid} has no guest RAM in a memfd", recorded_ram(ledger_fd))
    uffd = Userfaultfd(_take(pidfd, links, _UFFD, f"process {pid} has no userfaultfd: it runs without the shim"))
    backing = Backing(ram_fd)
    base = refusals.mapped_at(pid, backing)
    ledger = Ledger(ledger_fd, backing.pages, os.fstat(ram_fd).st_ino)
    reach("pager.attach.locked")
    if not any(ledger.totals().values()):
        # A guest with discarded pages needs its pager whatever was plugged in since: only epochs are refused then.
        refusals.refuse_at_attach(pid, backing)
    uffd.handshake()
    uffd.register(base, backing.pages << PAGE_SHIFT)
    reach("pager.attach.registered")
    ram = Ram(uffd, base, backing, ledger, Store(store_fd, backing.pages, on_disk=on_disk))
    _open_layers(ram, sources)
    ram.erase_present(0, ram.pages)
    reach("pager.attach.erased")
    ram.store.derive(ledger.entries)
    reach("pager.attach.derived")
    ram.unprotect(Run(0, ram.pages))
    reach("pager.attach.unprotected")
    ram.wake(Run(0, ram.pages))
    reach("pager.attach.woken")
    return ram


def _take(pidfd: int, links: dict[int, str], wanted: str, missing: str, inode: int = 0) -> int:
    """A duplicate of the one descriptor with this exact link text; several of one file count as one.

    The text is matched as a whole: QEMU's table also holds ``/dev/userfaultfd`` itself.

    :param inode: the one to take where there are several, as after memory was plugged in; 0 where it is not known.
    """
    numbers = sorted(number for number, link in links.items() if link == wanted)
    if not numbers:
        raise RefusedError(missing, refusals.SHIM_HINT)
    try:
        taken = [pidfd_getfd(pidfd, number) for number in numbers]
    except PermissionError as error:
        raise HostError("QEMU does not let us take its descriptors", "use the user that runs QEMU, or root") from error
    except OSError as error:
        raise PeerLost("QEMU went while we attached") from error
    if inode:
        for fd in [fd for fd in taken if os.fstat(fd).st_ino != inode]:
            taken.remove(fd)
            os.close(fd)
        if not taken:
            raise RefusedError(missing, refusals.SHIM_HINT)
    inodes = {os.fstat(fd).st_ino for fd in taken}
    for fd in taken[1:]:
        os.close(fd)
    # Anonymous inodes are all the same one, so several userfaultfds show as several descriptors.
    if len(inodes) > 1 or (wanted == _UFFD and len(numbers) > 1):
        os.close(taken[0])
        raise RefusedError(f"QEMU has several {wanted}", "one RAM backend and one shim are supported")
    return taken[0]


def _take_store(pid: int, pidfd: int, links: dict[int, str]) -> tuple[int, bool]:
    """The store's descriptor; is it a file on a disk?

    A compromised QEMU can have us take any file that it has open for writing itself, and no other.
    """
    missing = f"process {pid} has no store: it runs without the shim"
    if _STORE_AT not in links.values():
        return _take(pidfd, links, _STORE, missing), False
    where = _take(pidfd, links, _STORE_AT, missing)
    try:
        device, inode = store_identity(where)
    finally:
        os.close(where)
    file = take_file(pid, pidfd, device, inode)
    if file is None or fcntl.fcntl(file.fileno(), fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDWR:
        raise RefusedError(f"process {pid} does not have the file of its store open", refusals.SHIM_HINT)
    return os.dup(file.fileno()), True


def _open_layers(ram: Ram, sources: Sources) -> None:
    for slot, record in ram.ledger.layers().items():
        try:
            ram.layers[slot] = sources.layer(record)
        except LayerBetrayed as error:
            ram.broken[slot] = error.message
