"""A VM's disks over its life: frozen and merged when asked for and when due, one thing at a time, and put in order
after whatever a host agent died of."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from hva_host.agent import chain_policy
from hva_host.agent.chain import Chain, Merge
from hva_host.agent.chain_policy import DiskSample, Freeze, merge_down_to
from hva_host.agent.freezer import Disks, believe, freeze, index_frozen
from hva_host.agent.merge import merge, plan, sweep
from hva_host.agent.model import DiskStatus, FrozenDisk
from hvaqemu.config import FreezeConfig
from hvaqemu.errors import ConfigError, DeadlineExceeded, HvaError, PeerLost, RefusedError

#: How often sizes are looked at, by ``stat`` alone.
_LOOK_SECONDS = 2.0
_RETRY_SECONDS = 10.0
#: The part of a pager's time that it may take to look for pages that depend on merged files, and the longest pause that
#: makes: such a look may also have waited for an epoch.
_SWEEP_SHARE, _SWEEP_MOST = 0.02, 10.0


class ChainKeeper:
    """One VM's.

    :param refuse: raises while the VM is held.
    """

    def __init__(self, name: str, disks: Disks, config: FreezeConfig, refuse: Callable[[], None]) -> None:
        self._name = name
        self._disks = disks
        self._config = config
        self._refuse = refuse
        self._lock = asyncio.Lock()
        self._frozen_at: dict[str, float] = {}
        #: A host agent before us, or a peer that went, may have left something half done.
        self._unsettled = True
        self._over_budget = False
        self._sweep_at = 0.0
        #: There are frozen files that nothing new is matched with, because of a merge that came to nothing.
        self._withdrawn = False
        #: Merged files that could not be deleted, and why.
        self._undeleted: dict[Path, str] = {}

    async def freeze(self, disk: str | None) -> list[FrozenDisk]:
        """Freeze a disk, or all of them at one moment; returns once what was frozen is a layer.

        :raise ConfigError: no such disk.
        :raise RefusedError: the VM is held.
        :raise HvaError: a peer went or was silent, or there is no room; what was begun is ended later.
        """
        names = self._names(disk)
        async with self._lock:
            self._refuse()
            await self._settle()
            return await self._freeze(names)

    async def merge(self, disk: str | None) -> list[str]:
        """Merge all frozen files of a disk, or of each, into the lowest; files that went.

        :raise ConfigError: no such disk.
        :raise RefusedError: there is nothing to merge, or a page can not be moved out of the way.
        :raise HvaError: as :meth:`freeze`.
        """
        names = self._names(disk)
        async with self._lock:
            self._refuse()
            await self._settle()
            wanted = [name for name in names if len(self._disks.chain(name).frozen) > 1]
            if not wanted:
                raise RefusedError(f"VM {self._name}: nothing to merge: no disk has two frozen files")
            gone: list[str] = []
            for name in wanted:
                planned = plan(self._disks.chain(name), 0)
                if why := await self._merge(planned):
                    raise HvaError(f"disk {name}: the merge was taken back, and the chain is as it was: {why}")
                gone += map(str, planned.sources)
            return gone

    def status(self) -> list[DiskStatus]:
        """Every disk as it is recorded."""
        retired = self._disks.keeper.record.retired
        return [
            DiskStatus(
                disk=chain.disk,
                frozen=len(chain.frozen),
                indexed=sum(path in self._disks.book.images for path in chain.frozen),
                written_bytes=_bytes(chain.active),
                frozen_bytes=sum(map(_bytes, chain.frozen)),
                retired_bytes=sum(_bytes(path) for path in retired if path.name.startswith(chain.disk)),
            )
            for chain in self._disks.chains
        ]

    async def run(self) -> None:
        """Put in order what was left, then freeze and merge when that is due, until cancelled."""
        retry_at = 0.0
        while True:
            now = time.monotonic()
            if now >= retry_at and not self._lock.locked():
                try:
                    async with self._lock:
                        if self._unsettled:
                            await self._settle()
                            # Whoever died in a freeze had no time for that.
                            await self._shorten([chain.disk for chain in self._disks.chains])
                        if now >= self._sweep_at:
                            await self._sweep()
                        await self._freeze_when_due()
                except (PeerLost, DeadlineExceeded, RefusedError):
                    # Held, or a peer is away: it is tried again.
                    retry_at = now + _RETRY_SECONDS
                except HvaError as error:
                    retry_at = now + _RETRY_SECONDS
                    self._disks.tell("FREEZE_FAILED", {"error": str(error)})
            # What a guest writes to its disk is told by nobody.
            await asyncio.sleep(_LOOK_SECONDS)

    def _names(self, disk: str | None) -> list[str]:
        known = [chain.disk for chain in self._disks.chains]
        if not known:
            raise RefusedError(
                f"VM {self._name}: an earlier version of hvaqemu started it", "end it and start it again to freeze"
            )
        for place, extra in enumerate(self._disks.keeper.record.config.extra_disks):
            if disk == f"extra{place}":
                raise RefusedError(
                    f"VM {self._name}: {disk} is {extra.path}, a file of yours; frozen, it would no longer be what the "
                    "guest writes to",
                    f"its own disks can be frozen: {', '.join(known)}",
                )
        if disk is not None and disk not in known:
            raise ConfigError(f"VM {self._name}: no disk {disk!r} of its own", f"it has {', '.join(known)}")
        return known if disk is None else [disk]

    async def _settle(self) -> None:
        """Go on with what was begun; costs nothing where nothing was."""
        if not self._unsettled:
            return
        if not self._disks.chains:
            self._unsettled = False
            return
        wanted = self._disks.keeper.record.merging
        if wanted is not None:
            await merge(self._disks, wanted, self._config.patience)
        await believe(self._disks)
        await self._renew()
        await self._sweep()
        self._unsettled = False

    async def _renew(self) -> None:
        """Index what is frozen and no layer. A file that was withdrawn for a merge which came to nothing is indexed
        again once nothing depends on what it was; so is one that the pager has forgotten for a merge which was taken
        back before that was recorded."""
        known = await self._disks.book.dependants()
        used = {layer["path"] for layer in known} - {layer["path"] for layer in known if layer["withdrawn"]}
        self._withdrawn = False
        for chain in self._disks.chains:
            for path in chain.frozen:
                if path in self._disks.book.images and str(path) not in used:
                    async with self._disks.exclusive:
                        self._withdrawn |= not await self._disks.book.drop(path)
        await index_frozen(self._disks)

    async def _sweep(self) -> None:
        """See to what waits for the last page that depends on it."""
        began = time.monotonic()
        if self._withdrawn:
            await self._renew()
        failed = await sweep(self._disks)
        ended = time.monotonic()
        pause = min(_SWEEP_MOST, (ended - began) / _SWEEP_SHARE)
        self._sweep_at = ended + max(pause, _RETRY_SECONDS if failed else 0.0)
        for path, why in failed.items():
            if self._undeleted.get(path) != why:
                self._disks.tell("DELETE_FAILED", {"layer": str(path), "error": why})
        self._undeleted = failed

    async def _freeze(self, names: list[str]) -> list[FrozenDisk]:
        began = time.monotonic()
        self._unsettled = True
        frozen = await freeze(self._disks, names)
        pivoted = time.monotonic()
        for name in frozen:
            self._frozen_at[name] = pivoted
        await index_frozen(self._disks)
        self._unsettled = False
        indexed = time.monotonic()
        done = [
            FrozenDisk(
                disk=name,
                layer=str(frozen[name]) if name in frozen else None,
                bytes=_bytes(frozen[name]) if name in frozen else 0,
                seconds=pivoted - began,
                index_seconds=indexed - pivoted,
            )
            for name in names
        ]
        await self._shorten(list(frozen))
        return done

    async def _shorten(self, names: list[str]) -> None:
        """Merge what makes chains deeper than they may be."""
        for name in names:
            chain = self._disks.chain(name)
            place = merge_down_to([_bytes(path) for path in chain.frozen], self._config.depth)
            if place is not None:
                # One that is taken back is told of (MERGE_ENDED): what was asked for here is done.
                await self._merge(plan(chain, place))

    async def _merge(self, wanted: Merge) -> str:
        """Carry a merge out; why it was taken back, or ""."""
        self._unsettled = True
        why = await merge(self._disks, wanted, self._config.patience)
        await self._sweep()
        self._unsettled = False
        return why

    async def _freeze_when_due(self) -> None:
        if self._config.after is None or not self._disks.chains:
            return
        used = sum(status.written_bytes + status.frozen_bytes + status.retired_bytes for status in self.status())
        due: list[str] = []
        over = False
        for chain in self._disks.chains:
            said = chain_policy.freeze(self._sample(chain), self._config, used)
            due += [chain.disk] if said is Freeze.NOW else []
            over |= said is Freeze.BUDGET
        if over and not self._over_budget:
            self._disks.tell("FREEZE_BUDGET", {"used": used, "budget": self._config.disk_budget})
        self._over_budget = over
        if due:
            self._refuse()
            await self._freeze(due)

    def _sample(self, chain: Chain) -> DiskSample:
        at = self._frozen_at.get(chain.disk)
        return DiskSample(
            written=_bytes(chain.active),
            since=None if at is None else time.monotonic() - at,
        )


def _bytes(path: Path) -> int:
    """What a file occupies on the host; 0 where it is gone."""
    with suppress(OSError):
        return path.stat().st_blocks * 512
    return 0
