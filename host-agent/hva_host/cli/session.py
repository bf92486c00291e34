"""A subcommand's connection to the host agent."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, TypeVar

from hva_host.cli.loop import run_async

if TYPE_CHECKING:
    from hva_host.agent.client import ControlClient

T = TypeVar("T")


def with_agent(work: Callable[[ControlClient], Awaitable[T]]) -> T:
    """What ``work`` returns when given a connection to the host agent, which is started where none runs.

    :raise HvaError: there is none to be had, or what ``work`` raises.
    """
    from hva_host.agent.background import connect_or_start
    from hvaqemu.paths import runtime_dir

    async def connected() -> T:
        client = await connect_or_start(runtime_dir())
        try:
            return await work(client)
        finally:
            await client.close()

    return run_async(connected())
