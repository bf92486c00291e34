"""Chores: begun, waited for, cancelled, and loud when they meet with a bug."""

from __future__ import annotations

import asyncio
import logging

import pytest

from hva_host.agent.chores import Chores


class Owner:
    def __init__(self) -> None:
        self.failed: list[tuple[str, str]] = []
        self.chores = Chores("web", lambda name, error: self.failed.append((name, repr(error))))


async def test_settled_waits_for_all_also_for_those_begun_meanwhile() -> None:
    owner, done = Owner(), list[int]()

    async def work(left: int) -> None:
        await asyncio.sleep(0)
        done.append(left)
        if left:
            owner.chores.begin(f"work {left - 1}", work(left - 1))

    owner.chores.begin("work 3", work(3))
    async with asyncio.timeout(5):
        await owner.chores.settled()
        await owner.chores.settled()
    assert done == [3, 2, 1, 0]
    assert owner.failed == []


async def test_cancelled_ones_are_no_bugs() -> None:
    owner, ended = Owner(), asyncio.Event()

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    owner.chores.begin("work", work())
    await asyncio.sleep(0)
    async with asyncio.timeout(5):
        await owner.chores.cancel()
    assert ended.is_set()
    assert owner.failed == []


async def test_a_bug_is_told_and_logged_with_its_traceback(caplog: pytest.LogCaptureFixture) -> None:
    owner = Owner()

    async def work() -> None:
        raise ZeroDivisionError("of nothing")

    owner.chores.begin("hazards", work())
    with caplog.at_level(logging.ERROR):
        await owner.chores.settled()
        await asyncio.sleep(0)
    assert owner.failed == [("hazards", "ZeroDivisionError('of nothing')")]
    assert "web: hazards ended by a bug" in caplog.text
    assert "Traceback" in caplog.text
