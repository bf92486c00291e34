"""Fixtures that several modules share; what they are made of is in the modules called ``…_stand_ins``."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from hva_host.agent.guest_link import GuestLink
from tests.unit.control_stand_ins import Agent, Served, agent_in_thread, served, short_folder
from tests.unit.guest_stand_ins import PAGES, Serial


@pytest.fixture
async def serial(tmp_path: Path) -> AsyncIterator[Serial]:
    async with Serial(tmp_path) as serial:
        yield serial


@pytest.fixture
async def link(serial: Serial) -> AsyncIterator[GuestLink]:
    async with GuestLink(serial.socket, pages=PAGES) as link:
        yield link


@pytest.fixture
async def control_socket() -> AsyncIterator[Served]:
    with short_folder() as folder:
        async with served(folder) as found:
            yield found


@pytest.fixture
def agent(monkeypatch: pytest.MonkeyPatch) -> Iterator[Agent]:
    """A host agent that commands find."""
    with short_folder() as folder:
        monkeypatch.setenv("HVAQEMU_RUNTIME_DIR", str(folder))
        with agent_in_thread(folder) as found:
            yield found
