"""Watching the files that pages depend on, so that no page is made to depend on bytes somebody is changing.

What a layer serves is checked block by block, so a changed file never costs a wrong byte; it costs a HELD guest. This
watch is there to hear of it before that, and to stop making it worse. Three things watch, because none sees all:

* **a read lease** (:mod:`hva_host.agent.leases`) where the kernel grants one: the file's owner or CAP_LEASE, on a file
  system with leases. It is refused while anybody has the file open for writing, mapped writable or behind a loop
  device, and once held it tells of a writer *before* its first byte. It says nothing of a file that is renamed over,
  unlinked or made unreadable, and where none is granted a writer is looked for in /proc, which shows a user his own.
* **a fingerprint** (device, inode, size, mtime, ctime) of what the path leads to, everywhere: before every epoch and
  every :data:`LOOK_SECONDS`. It tells of a change after it was made, also of one made while no host agent ran (what it
  was is in the VM's record), and of a file put in another's place. mtime can be set back by anybody, ctime by nobody.
* **QEMU's image locks** (byte 100 and on of the file, OFD locks, set by QEMU itself since the image is opened with
  ``locking=auto``): they keep other QEMUs and qemu-img from opening the image for writing. They are advisory: ``dd``, a
  loop device or an editor never ask for them. So nothing here relies on them.

While anything is wrong, :attr:`LayerWatch.reason` says what, and nothing more is discarded. It ends by itself: a writer
closes the file, a file comes back; where the fingerprint is another one then, the whole content is compared with what
was indexed (in a thread; holes are not read), and only if it is the same byte for byte is the layer trusted again.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from hva_host.agent.chores import Chores
from hva_host.agent.leases import Breaks, Lease, LeaseState, writers
from hva_host.memory.index import LayerIndex
from hvaqemu.errors import HostError, HvaError, RefusedError
from hvaqemu.units import format_size

#: How often files are looked at, in seconds; leases tell at once.
LOOK_SECONDS = 2.0
#: From a lease's break until the writer's open has returned.
_OPENED_SECONDS = 0.1


class FilePrint(NamedTuple):
    """What tells one content of a file from another without reading it. Size in bytes, times in ns."""

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int


class LayerContent(NamedTuple):
    """A layer as pages were first matched against it: its file's fingerprint, its index's seed and digest."""

    print: FilePrint
    seed: int
    digest: int


def print_of(status: os.stat_result) -> FilePrint:
    """A file's fingerprint."""
    return FilePrint(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def refuse_writers(image: Path) -> None:
    """See that nobody has an image open for writing now.

    :raise RefusedError: somebody has; says who.
    :raise HostError: it can not be opened.
    """
    fd = _open(image)
    try:
        lease = Lease(fd).renew()
        found = writers(os.fstat(fd)) if lease is not LeaseState.HELD else []
        if found or lease is LeaseState.WRITER:
            raise RefusedError(
                f"image {image}: {_opened_by(found)}", "what pages depend on must not change; end that first"
            )
    finally:
        os.close(fd)


def content_of(image: Path, index: Path) -> LayerContent:
    """What a layer holds, by its index.

    :raise HostError: the image can not be opened, the index is damaged, or the image is not what was indexed.
    """
    fd = _open(image)
    try:
        known, found = LayerIndex.load(index), print_of(os.fstat(fd))
        if known.identity != found[: len(known.identity)]:
            raise HostError(f"image {image}: changed while it was indexed", "have nobody write it, and try again")
        return LayerContent(found, known.seed, known.digest)
    finally:
        os.close(fd)


def holds_still(image: Path, content: LayerContent) -> bool:
    """Whether a file holds what it held. Blocks, for a second a GiB or two if its fingerprint is another one.

    :raise HostError: it can not be opened.
    """
    fd = _open(image)
    try:
        found = print_of(os.fstat(fd))
        # A link that was made or a mode that was set changes no byte.
        return found[:4] == content.print[:4] or _holds(fd, found, content) is True
    finally:
        os.close(fd)


class LayerWatch:
    """The layers of one VM.

    :param layers: image and content of each.
    :param tell: told of changes: ``LAYER_WRITER``, ``LAYER_CHANGED`` and ``LAYER_TRUSTED``, with data fit for JSON.
    """

    def __init__(
        self, layers: Sequence[tuple[Path, LayerContent]], tell: Callable[[str, dict[str, Any]], None]
    ) -> None:
        self._tell = tell
        self._layers = [_Watched(path, content, tell) for path, content in layers]
        self._chores = Chores("layers", lambda task, error: tell("TASK_FAILED", {"task": task, "error": repr(error)}))
        self._soon = asyncio.Event()

    @property
    def reason(self) -> str:
        """Why no page may be made to depend on the layers now, or ""."""
        return "; ".join(f"layer {layer.path}: {layer.reason}" for layer in self._layers if layer.reason)

    def start(self) -> None:
        """Begin to watch. What is wrong already is told of and said by :attr:`reason`."""
        Breaks.join(self._broken)
        self.look()
        self._chores.begin("watch", self._go_on())

    def look(self) -> None:
        """Look at all of them now; takes microseconds as long as nothing is wrong."""
        for layer in self._layers:
            layer.look()

    def add(self, path: Path, content: LayerContent) -> None:
        """Watch another layer from now on."""
        layer = _Watched(path, content, self._tell)
        self._layers.append(layer)
        layer.look()

    async def remove(self, path: Path) -> None:
        """Watch a file no longer; its lease is given up."""
        gone = [layer for layer in self._layers if layer.path == path]
        self._layers = [layer for layer in self._layers if layer.path != path]
        for layer in gone:
            await layer.close()
            layer.trust()

    async def close(self) -> None:
        """End the watch; leases are given up."""
        Breaks.leave(self._broken)
        await self._chores.cancel()
        for layer in self._layers:
            await layer.close()

    def _broken(self) -> None:
        self.look()
        # Who waited for the lease is shown in /proc only once its open has returned.
        self._soon.set()

    async def _go_on(self) -> None:
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(LOOK_SECONDS):
                    await self._soon.wait()
                    self._soon.clear()
                    await asyncio.sleep(_OPENED_SECONDS)
            for layer in tuple(self._layers):
                await layer.search()
            self.look()


class _Watched:
    """One layer."""

    def __init__(self, path: Path, content: LayerContent, tell: Callable[[str, dict[str, Any]], None]) -> None:
        self.path = path
        self.reason = ""
        self._tell = tell
        self._content = content
        #: Of the content that was compared last and found wrong.
        self._wrong: FilePrint | None = None
        self._fd = -1
        self._lease: Lease | None = None
        self._compare: asyncio.Task[None] | None = None
        self._writers: list[str] = []

    def look(self) -> None:
        try:
            status = self.path.stat()
            self._open_again(status)
            event, reason = self._judge()
        except HostError as error:
            event, reason = "LAYER_CHANGED", error.message
        except OSError as error:
            event, reason = "LAYER_CHANGED", f"can not be looked at: {error.strerror}"
        self._enter(event, reason)

    def trust(self) -> None:
        """Nobody depends on it any more, so nothing is wrong with it."""
        self._enter("LAYER_TRUSTED", "")

    async def close(self) -> None:
        task, self._compare = self._compare, None
        if task is not None:
            task.cancel()
            await asyncio.wait({task})
        self._release()

    def _release(self) -> None:
        fd, self._fd, self._lease = self._fd, -1, None
        if fd >= 0:
            os.close(fd)

    def _open_again(self, status: os.stat_result) -> None:
        """Have the file open that the path leads to; one that was renamed over is let go."""
        if self._fd >= 0:
            ours = os.fstat(self._fd)
            if (ours.st_dev, ours.st_ino) == (status.st_dev, status.st_ino):
                return
        fd = _open(self.path)
        self._release()
        self._fd, self._lease = fd, Lease(fd)

    async def search(self) -> None:
        """Look for writers where there is no lease to tell of them."""
        if self._fd >= 0 and self._lease is not None and not self._lease.held:
            self._writers = await asyncio.to_thread(writers, os.fstat(self._fd))
        else:
            self._writers = []

    def _judge(self) -> tuple[str, str]:
        assert self._lease is not None
        if self._lease.renew() is LeaseState.WRITER:
            return "LAYER_WRITER", _opened_by(writers(os.fstat(self._fd)))
        if self._writers and not self._lease.held:
            return "LAYER_WRITER", _opened_by(self._writers)
        found, known = print_of(os.fstat(self._fd)), self._content.print
        if found == known:
            return "LAYER_TRUSTED", ""
        if found.size != known.size:
            return "LAYER_CHANGED", f"was {format_size(known.size)} long and is {format_size(found.size)}"
        if found == self._wrong:
            return "LAYER_CHANGED", "does not hold what was indexed any more"
        if self._compare is None:
            self._compare = asyncio.create_task(self._compare_content(found), name=f"compare {self.path}")
        return "LAYER_CHANGED", "has changed, and is being compared with what was indexed"

    async def _compare_content(self, found: FilePrint) -> None:
        right = await asyncio.to_thread(_holds, self._fd, found, self._content)
        self._compare = None
        # Unknown: it stays untrusted, and is compared again at the next look.
        if right is not None:
            if right:
                self._content = self._content._replace(print=found)
            self._wrong = None if right else found
            self.look()

    def _enter(self, event: str, reason: str) -> None:
        if reason == self.reason:
            return
        self.reason = reason
        self._tell(event, {"layer": str(self.path), "reason": reason})


def _open(path: Path) -> int:
    try:
        # Non-blocking, so that a FIFO in the file's place is not waited for.
        return os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise HostError(f"{path}: can not be opened: {error.strerror}") from error


def _holds(fd: int, found: FilePrint, content: LayerContent) -> bool | None:
    """Whether an open file holds a layer's content; None: it could not be read, or changed meanwhile. Takes a second
    for a GiB or two.

    :param fd: may be closed meanwhile.
    """
    try:
        own = os.dup(fd)
        try:
            if print_of(os.fstat(own)) != found:
                return None
            right = LayerIndex.of_layer(own, content.seed).digest == content.digest
            return right if print_of(os.fstat(own)) == found else None
        finally:
            os.close(own)
    except (OSError, HvaError):
        return None


def _opened_by(found: list[str]) -> str:
    who = ", ".join(found) or "somebody"
    return f"{who} {'have' if len(found) > 1 else 'has'} it open for writing"
