"""Indexes loaded before pagers are forked, so that all of them share one copy of each."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

from hva_host.memory.index import LayerIndex, StaleIndexError, fingerprint_file

_KEPT = 16
#: By seed and digest, which together mean one content.
_loaded: OrderedDict[tuple[int, int], LayerIndex] = OrderedDict()
#: Which file of which path is loaded.
_files: dict[Path, tuple[int, ...]] = {}


def preload(path: Path) -> None:
    """Load an index for :func:`preloaded`; one that can not be loaded is left to whoever needs it."""
    try:
        identity = fingerprint_file(path.stat())
        if _files.get(path) == identity:
            return
        index = LayerIndex.load(path)
    except (OSError, StaleIndexError):
        return
    _files[path] = identity
    _loaded.setdefault((index.seed, index.digest), index)
    _loaded.move_to_end((index.seed, index.digest))
    if len(_loaded) > _KEPT:
        _loaded.popitem(last=False)
        _files.clear()


def preloaded(seed: int, digest: int) -> LayerIndex | None:
    """The index of that content, if it was loaded."""
    return _loaded.get((seed, digest))
