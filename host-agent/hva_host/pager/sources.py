"""Where the layers a ledger names are found again, and whose word is taken for it.

A ledger lies in QEMU's table, so a compromised QEMU could have it name any file of the host; a pager of root would then
read that file to the guest. So a layer is taken from two places only: QEMU's own descriptor table, by device and inode
(what QEMU can read, the guest's host side knows already), and the paths the host agent gave this pager. Whichever file
it is, every block is checked against the recorded index before it is served.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from io import FileIO
from pathlib import Path

from hva_host.memory.index import LayerIndex, StaleIndexError
from hva_host.memory.layers import Layer, LayerBetrayed, open_image
from hva_host.memory.ledger import LayerRecord
from hva_host.memory.preloaded import preloaded
from hva_host.pager.process_files import take_file
from hvaqemu.errors import HostError


class Sources:
    """Finds the layers of one VM.

    :param trusted: image and index of each layer, as the host agent knows them.
    """

    def __init__(self, pid: int, pidfd: int, trusted: Sequence[tuple[Path, Path]] = ()) -> None:
        self._pid = pid
        self._pidfd = pidfd
        self._trusted = dict(trusted)

    def trust(self, path: Path, index_path: Path) -> None:
        """The host agent named another layer."""
        self._trusted[path] = index_path

    def layer(self, record: LayerRecord) -> Layer:
        """The recorded layer, from the best place there is.

        :raise LayerBetrayed: there is none, or its index is lost and can not be made again.
        """
        path = Path(record.path)
        file = next(self.files(record), None)
        if file is None:
            raise LayerBetrayed(f"layer {record.path}: {self._why_not(path)}")
        return Layer(path, file, self._index(record, file), Path(record.index_path))

    def files(self, record: LayerRecord) -> Iterator[FileIO]:
        """Files that may hold the layer's bytes, best first: the recorded file, then what is at its path now."""
        at_path: FileIO | None = None
        if Path(record.path) in self._trusted:
            with suppress(HostError):
                at_path = open_image(Path(record.path))
        if at_path is not None and _is(os.fstat(at_path.fileno()), record):
            yield at_path
            return
        of_qemu = take_file(self._pid, self._pidfd, record.device, record.inode)
        if of_qemu is not None:
            yield of_qemu
        if at_path is not None:
            yield at_path

    def _index(self, record: LayerRecord, file: FileIO) -> LayerIndex:
        """The index pages were discarded against: loaded before, from its file, or made again with its seed."""
        found = preloaded(record.seed, record.digest)
        if found is not None:
            return found
        trusted = self._trusted.get(Path(record.path))
        if trusted is not None:
            with suppress(StaleIndexError):
                index = LayerIndex.load(trusted)
                if (index.seed, index.digest) == (record.seed, record.digest):
                    return index
        try:
            index = LayerIndex.of_layer(file.fileno(), record.seed)
        except (HostError, OSError) as error:
            raise LayerBetrayed(f"layer {record.path}: its index is lost, and {error}") from error
        if index.digest != record.digest:
            raise LayerBetrayed(f"layer {record.path}: it has changed, and its index {record.index_path} is lost")
        return index

    def _why_not(self, path: Path) -> str:
        if path not in self._trusted:
            return "QEMU does not have it open any more"
        try:
            open_image(path).close()
        except HostError as error:
            return error.message.removeprefix(f"layer {path}: ")
        return "it came back just now; try again"


def _is(status: os.stat_result, record: LayerRecord) -> bool:
    return (status.st_dev, status.st_ino) == (record.device, record.inode)
