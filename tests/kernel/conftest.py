"""Fixtures of the kernel tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.kernel.harness import Guest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "tests/kernel" in str(item.path):
            item.add_marker(pytest.mark.kernel)


@pytest.fixture
def guest() -> Iterator[Guest]:
    with Guest() as found:
        yield found


@pytest.fixture(scope="module", autouse=True)
def settled_host(settled: None) -> None:
    """Huge pages behind memory would change what is measured here."""
