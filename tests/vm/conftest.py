"""What the tests that boot guests share, as far as pytest must know of it; the rest is in ``harness.py``."""

from __future__ import annotations

from pathlib import Path

import pytest

#: Needs no guest.
_WITHOUT = "test_shim.py"
#: Has the host to itself (``tests/privileged.py``), so it comes before other processes of a run have begun something.
_FIRST = "test_huge_pages.py"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents and item.path.name != _WITHOUT:
            item.add_marker(pytest.mark.vm)
    items.sort(key=lambda item: item.path.name != _FIRST)


@pytest.fixture(scope="module", autouse=True)
def settled_host(settled: None) -> None:
    """Huge pages behind memory would change what is measured here."""
