"""Layers that come and go under a guest: withdrawn, moved away from, forgotten, and their slots used again."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from hva_host.agent.pager_process import call
from hva_host.memory.index import build_index
from hvaqemu.errors import PeerLost
from tests.kernel.faults import COPIES, Machine
from tests.kernel.harness import block

POINTS = ["pager.layer.withdrawn", "pager.layer.freed"]


@pytest.fixture
async def machine(tmp_path: Path) -> AsyncIterator[Machine]:
    found = Machine(tmp_path, dict.fromkeys(POINTS, "kill"))
    try:
        await found.start()
        yield found
    finally:
        await found.close()


async def ask(machine: Machine, command: str, **arguments: Any) -> dict[str, Any]:
    """Asked again where the pager dies of it: it may be asked twice."""
    path = str(machine.layers[0][0])
    while True:
        restarts = machine.restarts
        try:
            return dict(await machine.pager.link.call(command, {"path": path, **arguments}))
        except PeerLost:
            await machine.restarted(restarts + 1)


async def layers(machine: Machine) -> list[tuple[int, bool, int]]:
    found = (await call(machine.pager, "layers"))["layers"]
    return [(layer["slot"], layer["withdrawn"], layer["pages"]) for layer in found]


async def test_nothing_new_is_matched_and_the_rest_is_served(machine: Machine) -> None:
    assert await machine.epoch() is not None
    assert await layers(machine) == [(0, False, len(COPIES))]
    assert (await ask(machine, "withdraw-layer", move=False))["left"] == len(COPIES)
    # Also by the next pager, which is told of the layer again.
    await machine.replace_pager()
    assert await layers(machine) == [(0, True, len(COPIES))]
    assert await ask(machine, "drop-layer") == {"dropped": False, "left": len(COPIES)}
    await machine.check()
    done = await machine.epoch()
    assert done is not None
    assert done["discarded_layer"] == 0
    assert done["unmatched"] == len(COPIES)


@pytest.mark.parametrize("point", ["", *POINTS])
async def test_moved_forgotten_and_its_slot_used_again(machine: Machine, point: str) -> None:
    assert await machine.epoch() is not None
    if point:
        machine.arm(point)
    moved = await ask(machine, "withdraw-layer", move=True)
    assert (moved["left"], moved["why"]) == (0, "")
    assert (await ask(machine, "drop-layer"))["dropped"] or point == POINTS[1]
    assert not point or not machine.armed(point)
    if point == POINTS[1]:
        # It died after it had forgotten the layer, and its successor was told of it: it is withdrawn once more.
        await ask(machine, "withdraw-layer", move=True)
        assert (await ask(machine, "drop-layer"))["dropped"]
    assert await layers(machine) == []
    # Another layer, in the same slot, whose blocks are others: entries of old would bring wrong bytes.
    path, index = machine.folder / "next.raw", machine.folder / "next.idx"
    path.write_bytes(b"".join(block(pfn) for pfn in reversed(COPIES)))
    build_index(path, index)
    machine.layers = ((path, index),)
    await ask(machine, "add-layer", index=str(index))
    assert await layers(machine) == [(0, False, 0)]
    done = await machine.epoch()
    assert done is not None
    assert done["discarded_layer"] == len(COPIES)
    await machine.check()
