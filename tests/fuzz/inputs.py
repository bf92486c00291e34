"""The corpus: one zip file a target, so that hundreds of tiny inputs are three files to whoever reads the repository.

The same inputs make the same bytes, whenever and wherever they are packed: names and order come from the content, time
stamps are fixed, and nothing is deflated, which another zlib may do otherwise.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Iterable
from pathlib import Path

CORPUS = Path(__file__).parent / "corpus"
#: The earliest that the format knows.
_TIME = (1980, 1, 1, 0, 0, 0)


def archive(target: str) -> Path:
    """Where a target's inputs are packed."""
    return CORPUS / f"{target}.zip"


def read(target: str) -> dict[str, bytes]:
    """A target's inputs by name, which is the SHA-1 of the input, as libFuzzer names them."""
    with zipfile.ZipFile(archive(target)) as file:
        return {name: file.read(name) for name in file.namelist()}


def pack(path: Path, inputs: Iterable[bytes]) -> None:
    """Write an archive of these inputs, each once."""
    named = {hashlib.sha1(data, usedforsecurity=False).hexdigest(): data for data in inputs}
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as file:
        for name, data in sorted(named.items()):
            file.writestr(zipfile.ZipInfo(name, _TIME), data)


def unpack(target: str, folder: Path) -> None:
    """Write a target's inputs as files into a folder, for libFuzzer."""
    for name, data in read(target).items():
        (folder / name).write_bytes(data)
