"""Attaching to a running QEMU by pid: first attach and re-attach after a crash are the same.

Order: lock the ledger → register → presence: erase entries of present pages → derive what of the store is in use →
unprotect everything → wake everyone (re-delivers what a dead pager had read and not answered) → serve.
"""

from __future__ import annotations

import os

from hva_host.memory.backing import Backing
from hva_host.memory.layers import LayerBetrayed
from hva_host.memory.ledger import LEDGER_NAME, Ledger, recorded_ram
from hva_host.memory.store import Store
from hva_host.memory.syscalls import pidfd_getfd
from hva_host.memory.userfaultfd import Userfaultfd
from hva_host.pager import refusals
from hva_host.pager.process_files import descriptors
from hva_host.pager.ram import Ram
from hva_host.pager.sources import Sources
from hvaqemu.errors import HostError, PeerLost, RefusedError
from hvaqemu.faultpoints import reach
from hvaqemu.pages import PAGE_SHIFT, Run

_UFFD = "anon_inode:[userfaultfd]"
_LEDGER = f"/memfd:{LEDGER_NAME} (deleted)"
_STORE = "/memfd:hva-store (deleted)"
_RAM = "/memfd:memory-backend-memfd (deleted)"


def attach(pid: int, pidfd: int, sources: Sources) -> Ram:
    """Take charge of a QEMU's RAM.

    :param sources: finds the layers that pages depend on.
    :raise RefusedError: another pager serves it, or its RAM is not of a kind that can be paged.
    :raise HostError: not permitted, or the host has no memory for the ledger.
    :raise PeerLost: it is gone.
    """
    links = descriptors(pid)
    ledger_fd = _take(pidfd, links, _LEDGER, f"process {pid} has no ledger: it runs without the shim")
    store_fd = _take(pidfd, links, _STORE, f"process {pid} has no store: it runs without the shim")
    ram_fd = _take(pidfd, links, _RAM, f"process {pid} has no guest RAM in a memfd", recorded_ram(ledger_fd))
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
    ram = Ram(uffd, base, backing, ledger, Store(store_fd, backing.pages))
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


def _open_layers(ram: Ram, sources: Sources) -> None:
    for slot, record in ram.ledger.layers().items():
        try:
            ram.layers[slot] = sources.layer(record)
        except LayerBetrayed as error:
            ram.broken[slot] = error.message
