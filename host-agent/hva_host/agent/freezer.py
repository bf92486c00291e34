"""Freezing: a disk's writable file becomes a layer, and an empty one takes its place.

The order, with a fault point between each two steps; whoever is killed, the chain boots and no byte is missing:

1. the new file is made (0600), empty, on top of the present one. Unknown to everybody, it is rubbish.
2. its name is recorded as ``pending``. If QEMU is killed from here on, it is an empty file on top of the others or
   holds what the guest wrote since, and belongs to the chain either way.
3. QEMU opens it, and pivots all disks to their new files in one transaction.
4. QEMU's own block graph is believed, and recorded; ``pending`` is over.
5. the frozen file is made read-only (0400). QEMU has reopened it read-only by then, so the layer watch gets its lease.
6. it is indexed, recorded as a layer, watched, and the pager hears of it (:mod:`hva_host.agent.layer_book`).

A disk that nothing was written to since it was frozen last is passed over: its file would be an empty layer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hva_host.agent.chain import Chain, files_of
from hva_host.agent.layer_book import Keeper, LayerBook, Tell
from hvaqemu.errors import HostError, PeerLost
from hvaqemu.faultpoints import reach
from hvaqemu.qemu.command import overlay_node
from hvaqemu.qemu.disk import create_next
from hvaqemu.qemu.qmp import QmpError, QmpLink

#: QEMU drains the disks, which may take what the host's disks take.
_PIVOT_SECONDS = 60.0
INDEX_SUFFIX = ".idx"


@dataclass(frozen=True)
class Disks:
    """What freezing and merging work on.

    :ivar qmp: the link there is now; raises :class:`PeerLost` where there is none.
    :ivar exclusive: held during an epoch, and by whatever must not overlap one.
    :ivar available: bytes of memory the host can still give to QEMU.
    """

    keeper: Keeper
    book: LayerBook
    qmp: Callable[[], QmpLink]
    exclusive: asyncio.Lock
    tell: Tell
    available: Callable[[], int]

    @property
    def chains(self) -> tuple[Chain, ...]:
        return self.keeper.record.chains

    def chain(self, disk: str) -> Chain:
        return next(chain for chain in self.chains if chain.disk == disk)

    def store(self, *changed: Chain, **more: Any) -> None:
        """Record what became of some chains.

        :raise HostError: no room; nothing has changed.
        """
        new = {chain.disk: chain for chain in changed}
        self.keeper.store(chains=tuple(new.get(chain.disk, chain) for chain in self.chains), **more)


async def freeze(disks: Disks, names: Sequence[str]) -> dict[str, Path]:
    """Freeze those of these disks that something was written to, at one moment; the files frozen. They are no layers
    yet: :func:`index_frozen` makes them that.

    :raise HvaError: nothing is frozen, or it is not known, and then :func:`believe` finds out.
    """
    qmp = disks.qmp()
    wanted: list[Chain] = []
    for chain in (disks.chain(name).next() for name in names):
        assert chain.pending is not None
        # Of a freeze that failed; QEMU has none of that name, or blockdev-add says so.
        delete(chain.pending)
        await asyncio.to_thread(create_next, chain.active, chain.pending, chain.size)
        if _holds_nothing(chain.active, chain.pending):
            delete(chain.pending)
        else:
            wanted.append(chain)
    reach("agent.freeze.made")
    if not wanted:
        return {}
    disks.store(*wanted)
    reach("agent.freeze.recorded")
    try:
        actions: list[dict[str, object]] = []
        for chain in wanted:
            assert chain.pending is not None
            await qmp.execute("blockdev-add", overlay_node(chain.pending, None))
            actions.append(
                {
                    "type": "blockdev-snapshot",
                    "data": {"node": chain.active.stem, "overlay": chain.pending.stem},
                }
            )
        reach("agent.freeze.opened")
        await qmp.execute("transaction", {"actions": actions}, timeout=_PIVOT_SECONDS)
    except QmpError:
        # Refused, so nothing has changed.
        await believe(disks)
        raise
    reach("agent.freeze.pivoted")
    await believe(disks)
    for chain in wanted:
        disks.tell("FROZEN", {"disk": chain.disk, "layer": str(chain.active)})
    return {chain.disk: chain.active for chain in wanted}


async def believe(disks: Disks) -> None:
    """Record what QEMU says of the disks; files that were made for nothing go.

    :raise HvaError: QEMU went, or did not answer.
    """
    qmp = disks.qmp()
    found: list[Chain] = []
    for chain in disks.chains:
        files = await files_of(qmp, chain)
        found.append(chain.as_found(files))
        if chain.pending is not None and chain.pending not in files:
            with suppress(QmpError):
                await qmp.execute("blockdev-del", {"node-name": chain.pending.stem})
            delete(chain.pending)
    if tuple(found) != disks.chains:
        disks.store(*found)
    reach("agent.freeze.believed")


async def index_frozen(disks: Disks) -> list[Path]:
    """Make layers of all frozen files that are none yet; which were made.

    :raise HvaError: one can not be read, there is no room, or the pager is silent.
    """
    added: list[Path] = []
    for chain in disks.chains:
        for path in chain.frozen:
            if path not in disks.book.images:
                try:
                    path.chmod(0o400)
                except OSError as error:
                    raise HostError(f"{path}: {error.strerror}") from error
                reach("agent.freeze.closed")
                await disks.book.add(path, _index_of(path))
                added.append(path)
    return added


def delete(path: Path) -> None:
    """Delete a file, if it is there.

    :raise HostError: it can not be deleted.
    """
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise HostError(f"{path}: can not be deleted: {error.strerror}") from error


def connected(qmp: QmpLink | None) -> QmpLink:
    """A link that is up.

    :raise PeerLost: it is not.
    """
    if qmp is None or not qmp.connected:
        raise PeerLost("QMP: not connected")
    return qmp


def _holds_nothing(path: Path, empty: Path) -> bool:
    """Whether a qcow2 file has nothing in it, as an ``empty`` one of the same size: what is written goes behind its
    tables, and so do the tables for that."""
    try:
        return path.stat().st_size <= empty.stat().st_size
    except OSError as error:
        raise HostError(f"{error.filename}: {error.strerror}") from error


def _index_of(path: Path) -> Path:
    """The index of a frozen file. One for what the file held before it was merged into does not fit it any more, and is
    replaced: the pages that it was for have been moved by then."""
    return path.with_name(f"{path.name}{INDEX_SUFFIX}")
