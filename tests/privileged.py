"""Settings of the host that tests change and put back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

_SHMEM = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")


@contextmanager
def shmem_enabled(setting: str) -> Iterator[None]:
    """The host's setting for huge pages behind shared memory; put back whatever happens. Skips where it is not ours."""
    try:
        before = next(word[1:-1] for word in _SHMEM.read_text().split() if word.startswith("["))
        _SHMEM.write_text(setting)
    except OSError as error:
        pytest.skip(f"{_SHMEM}: {error.strerror}")
    try:
        yield
    finally:
        _SHMEM.write_text(before)
