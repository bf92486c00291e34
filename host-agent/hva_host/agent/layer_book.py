"""The layers of one VM: its record, the watch over their files and its pager kept in step.

Order: a layer is recorded before the pager hears of it, because a pager that is started later takes it from the record;
the pager forgets it before the record does, because a page may depend on it until then.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from hva_host.agent.layer_watch import LayerWatch, content_of
from hva_host.agent.pager_process import PagerHandle
from hva_host.agent.records import VmRecord
from hva_host.memory.index import StaleIndexError, build_index
from hva_host.memory.layers import open_layer
from hvaqemu.errors import DeadlineExceeded, PeerLost
from hvaqemu.faultpoints import reach

Tell = Callable[[str, dict[str, Any]], None]

#: A pager that died is replaced meanwhile.
_PAGER_SECONDS = 30.0
_RETRY_SECONDS = 0.1
_DROP_SECONDS = 30.0
_MOVE_SECONDS_PER_GIB = 60.0
_TELL_SECONDS = 0.5


def _ensure_index(image: Path, index: Path, progress: Callable[[int, int], None]) -> None:
    try:
        open_layer(image, index).close()
    except StaleIndexError:
        build_index(image, index, progress)


class Keeper(Protocol):
    """Who keeps the VM's record."""

    @property
    def record(self) -> VmRecord: ...

    def store(self, **changes: Any) -> None:
        """Replace parts of the record.

        :raise HostError: no room; nothing has changed.
        """


class LayerBook:
    """One VM's.

    :param pager: the pager there is now.
    :param tell: told of ``LAYER_INDEXING`` and ``LAYER_ADDED``, ``LAYER_DROPPED``, with data fit for JSON.
    """

    def __init__(self, keeper: Keeper, watch: LayerWatch, pager: Callable[[], PagerHandle], tell: Tell) -> None:
        self._keeper = keeper
        self._watch = watch
        self._pager = pager
        self._tell = tell

    @property
    def images(self) -> tuple[Path, ...]:
        """Files that pages may depend on."""
        return tuple(image for image, _ in self._keeper.record.layers)

    async def add(self, image: Path, index: Path) -> None:
        """Index a file that no longer changes, and let pages be matched with it.

        :param index: where its index is or goes.
        :raise HvaError: it can not be read, there is no room, or it changed meanwhile.
        """
        await asyncio.to_thread(_ensure_index, image, index, self._progress(image))
        reach("agent.layer.indexed")
        content = await asyncio.to_thread(content_of, image, index)
        record = self._keeper.record
        self._keeper.store(layers=(*record.layers, (image, index)), contents=(*record.contents, content))
        reach("agent.layer.listed")
        self._watch.add(image, content)
        await self._call("add-layer", {"path": str(image), "index": str(index)})
        reach("agent.layer.added")
        self._tell("LAYER_ADDED", {"layer": str(image), "bytes": content.print.size})

    async def withdraw(self, image: Path, *, move: bool) -> tuple[int, str]:
        """Have nothing new matched with a layer. Must not overlap an epoch.

        :param move: make its pages resident.
        :return: how many pages depend on it still, and why those could not be moved.
        :raise HvaError: the pager went or was silent.
        """
        pages = next((layer["pages"] for layer in await self.dependants() if layer["path"] == str(image)), 0)
        seconds = _DROP_SECONDS + _MOVE_SECONDS_PER_GIB * pages / (1 << 18)
        answer = await self._call("withdraw-layer", {"path": str(image), "move": move}, seconds)
        return int(answer["left"]), str(answer["why"])

    async def drop(self, image: Path) -> bool:
        """Forget a withdrawn layer, if no page depends on it; was it forgotten? Must not overlap an epoch.

        :raise HvaError: the pager went or was silent.
        """
        if not (await self._call("drop-layer", {"path": str(image)}, _DROP_SECONDS))["dropped"]:
            return False
        reach("agent.layer.dropped")
        record = self._keeper.record
        kept = [place for place, (path, _) in enumerate(record.layers) if path != image]
        gone = [index for path, index in record.layers if path == image]
        self._keeper.store(
            layers=tuple(record.layers[place] for place in kept),
            contents=tuple(record.contents[place] for place in kept),
        )
        await self._watch.remove(image)
        for index in gone:
            with suppress(OSError):
                index.unlink(missing_ok=True)
        self._tell("LAYER_DROPPED", {"layer": str(image)})
        return True

    async def dependants(self) -> list[dict[str, Any]]:
        """Slot, path, whether withdrawn, and pages that depend on it, of every layer the pager has.

        :raise HvaError: the pager went or was silent.
        """
        return list((await self._call("layers", {}))["layers"])

    async def _call(self, command: str, arguments: dict[str, Any], timeout: float = _PAGER_SECONDS) -> Any:
        """Whatever it is, it may be asked twice: a pager that died may have done it."""
        until = time.monotonic() + _PAGER_SECONDS
        while True:
            try:
                return await self._pager().link.call(command, arguments, timeout=timeout)
            except PeerLost as error:
                if time.monotonic() > until:
                    raise DeadlineExceeded(f"pager {command}: no pager for {_PAGER_SECONDS:.0f} s") from error
                # Its keeper (hva_host.agent.pager_keeper) is at it, and has others to tell.
                await asyncio.sleep(_RETRY_SECONDS)

    def _progress(self, image: Path) -> Callable[[int, int], None]:
        loop, told = asyncio.get_running_loop(), 0.0

        def progress(done: int, size: int) -> None:
            nonlocal told
            if time.monotonic() - told >= _TELL_SECONDS:
                told = time.monotonic()
                data = {"layer": str(image), "done": done, "size": size}
                loop.call_soon_threadsafe(self._tell, "LAYER_INDEXING", data)

        return progress
