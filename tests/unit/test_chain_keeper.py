"""What a VM's disks come to that nobody asked for: the keeper goes on whatever it meets."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, cast

import pytest

from hva_host.agent import chain_keeper
from hva_host.agent.chain_keeper import ChainKeeper
from hva_host.agent.freezer import Disks
from hva_host.agent.layer_book import LayerBook
from hva_host.agent.records import VmRecord
from hvaqemu.config import FreezeConfig, VmConfig
from hvaqemu.errors import HostError, HvaError
from hvaqemu.qemu.qmp import QmpLink
from hvaqemu.units import MiB
from tests.unit.guest_stand_ins import eventually


class _Keeper:
    """Keeps a record in memory."""

    def __init__(self, retired: Path) -> None:
        self.record = VmRecord(
            config=VmConfig(name="one", memory=256 * MiB),
            qemu_pid=1,
            qemu_start_time=2,
            layers=(),
            contents=(),
            retired=(retired,),
        )

    def store(self, **changes: Any) -> None:
        self.record = self.record.model_copy(update=changes)


class _Book:
    """No page depends on anything."""

    images: tuple[Path, ...] = ()

    async def dependants(self) -> list[dict[str, Any]]:
        return []


def _no_qmp() -> QmpLink:
    raise HvaError("QEMU is not needed to delete a file")


async def test_a_file_that_can_not_be_deleted_is_told_of_once_and_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chain_keeper, "_LOOK_SECONDS", 0.01)
    monkeypatch.setattr(chain_keeper, "_RETRY_SECONDS", 0.05)
    # The kernel unlinks no directory.
    path = tmp_path / "root-1.qcow2"
    path.mkdir()
    told: list[tuple[str, dict[str, Any]]] = []
    keeper = _Keeper(path)
    disks = Disks(
        keeper,
        cast(LayerBook, _Book()),
        _no_qmp,
        asyncio.Lock(),
        lambda event, data: told.append((event, data)),
        lambda: 0,
    )
    attempts = 0
    unlink = Path.unlink

    def counted(self: Path, missing_ok: bool = False) -> None:
        nonlocal attempts
        attempts += self == path
        unlink(self, missing_ok)

    monkeypatch.setattr(Path, "unlink", counted)
    task = asyncio.create_task(ChainKeeper("one", disks, FreezeConfig(), lambda: None).run())
    await eventually(lambda: attempts >= 3)
    assert [event for event, _ in told] == ["DELETE_FAILED"]
    assert told[0][1]["layer"] == str(path)
    assert told[0][1]["error"]
    assert keeper.record.retired == (path,)
    path.rmdir()
    path.touch()
    await eventually(lambda: not keeper.record.retired)
    assert not path.exists()
    assert not task.done()
    task.cancel()
    await asyncio.wait({task})


async def test_it_goes_on_when_the_record_can_not_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chain_keeper, "_LOOK_SECONDS", 0.01)
    monkeypatch.setattr(chain_keeper, "_RETRY_SECONDS", 0.05)
    path = tmp_path / "root-1.qcow2"
    path.touch()
    told: list[str] = []
    keeper = _Keeper(path)
    room = False

    def store(**changes: Any) -> None:
        if not room:
            raise HostError("no room")
        _Keeper.store(keeper, **changes)

    monkeypatch.setattr(keeper, "store", store)
    disks = Disks(
        keeper, cast(LayerBook, _Book()), _no_qmp, asyncio.Lock(), lambda event, _data: told.append(event), lambda: 0
    )
    task = asyncio.create_task(ChainKeeper("one", disks, FreezeConfig(), lambda: None).run())
    await eventually(lambda: "FREEZE_FAILED" in told)
    room = True
    await eventually(lambda: not keeper.record.retired)
    task.cancel()
    await asyncio.wait({task})
