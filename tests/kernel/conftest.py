"""Fixtures of the kernel tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.kernel.harness import Guest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "tests/kernel" in str(item.path):
            item.add_marker(pytest.mark.kernel)


@pytest.fixture
def store_folder() -> Path | None:
    """Where the guest's store is a file; None: it is in memory. For a module to override."""
    return None


@pytest.fixture
def guest(store_folder: Path | None) -> Iterator[Guest]:
    with Guest(folder=store_folder) as found:
        yield found


@pytest.fixture(scope="module", autouse=True)
def settled_host(settled: None) -> None:
    """Huge pages behind memory would change what is measured here."""


@pytest.fixture
def cold_guest(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> Guest:
    """All of its pages go at once: what is cold is another test's subject."""
    monkeypatch.setattr(guest.samples.stable, "_shares", np.ones(1, dtype=np.float32))
    monkeypatch.setattr("hva_host.pager.coldness.WATCHED_SECONDS", 0.0)
    monkeypatch.setattr("hva_host.pager.coldness._REST_TICKS", 0)
    monkeypatch.setattr(guest.samples.stable, "_hot", 1e9)
    return guest


@pytest.fixture(params=[False, True], ids=["in memory", "on disk"])
def on_disk(request: pytest.FixtureRequest) -> bool:
    """Is the store a file?"""
    return bool(request.param)
