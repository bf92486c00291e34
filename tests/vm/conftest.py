"""What the tests that boot guests share, as far as pytest must know of it; the rest is in ``harness.py``."""

from __future__ import annotations

from pathlib import Path

import pytest

#: Needs no guest.
_WITHOUT = "test_shim.py"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents and item.path.name != _WITHOUT:
            item.add_marker(pytest.mark.vm)
