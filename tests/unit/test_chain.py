"""What is recorded of a VM's own disks, and what is kept of them when it ends."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import pytest

from hva_host.agent.chain import Chain, files_of
from hva_host.agent.layer_watch import FilePrint, LayerContent
from hva_host.agent.monitor import refusal
from hva_host.agent.records import VmFolder, VmRecord
from hvaqemu.config import VmConfig
from hvaqemu.errors import HostError, PeerLost, ProtocolError
from hvaqemu.qemu.qmp import QmpLink
from hvaqemu.units import MiB


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> VmFolder:
    monkeypatch.setenv("HVAQEMU_STATE_DIR", str(tmp_path / "s"))
    return VmFolder(tmp_path, "one")


def chain(place: Path, *names: str, **more: Any) -> Chain:
    files = tuple(place / name for name in names)
    return Chain(disk="root", base=Path("/i/root.ext4"), files=files, size=1 << 30, **more)


def record(*chains: Chain) -> VmRecord:
    return VmRecord(
        config=VmConfig(name="one", memory=256 * MiB),
        qemu_pid=1,
        qemu_start_time=2,
        layers=((Path("/i/root.ext4"), Path("/i/idx")),),
        contents=(LayerContent(FilePrint(1, 2, 3, 4, 5), 6, 7),),
        chains=chains,
    )


def test_no_name_is_used_twice() -> None:
    first = chain(Path("/v"), "root.qcow2").next()
    assert first.pending == Path("/v/root-1.qcow2")
    assert first.as_found((*first.files, Path("/v/root-1.qcow2"))).pending is None
    # It was not pivoted to; and once more.
    assert first.as_found(first.files).next().pending == Path("/v/root-2.qcow2")


def test_without_qemu_what_was_pending_lies_on_top(tmp_path: Path) -> None:
    begun = chain(tmp_path, "root.qcow2").next()
    assert begun.without_qemu().files == begun.files
    assert begun.pending is not None
    begun.pending.touch()
    assert begun.without_qemu().files == (*begun.files, begun.pending)
    assert begun.without_qemu().pending is None


class _Qemu:
    """What QEMU 7.2 answers to query-block, cut to what is read."""

    def __init__(self, answer: object) -> None:
        self._answer = answer

    async def execute(self, command: str, _arguments: Mapping[str, object] | None = None) -> object:
        assert command == "query-block"
        return self._answer


def found(answer: object) -> tuple[Path, ...]:
    return asyncio.run(files_of(cast(QmpLink, _Qemu(answer)), chain(Path("/v"), "root.qcow2")))


_BASE = {"filename": "/i/root.ext4", "format": "raw"}
_FIRST = {"filename": "/v/root.qcow2", "format": "qcow2", "backing-image": _BASE}
_ODD = (
    'json:{"backing": {"driver": "raw"}, "driver": "qcow2", "file": {"driver": "file", "filename": "/v/root-1.qcow2"}}'
)


def block(qdev: str, image: object) -> dict[str, object]:
    return {"qdev": qdev, "inserted": {"image": image}}


def test_qemus_graph() -> None:
    others = [{"qdev": "/machine/peripheral/disk-swap/virtio-backend"}, {"device": "x"}]
    top = {"filename": _ODD, "format": "qcow2", "backing-image": _FIRST}
    assert found([*others, block("/machine/peripheral/disk-root/virtio-backend", top)]) == (
        Path("/v/root.qcow2"),
        Path("/v/root-1.qcow2"),
    )
    with pytest.raises(PeerLost, match="no disk root"):
        found(others)
    for nonsense in (None, {"format": "qcow2", "filename": "json:{"}, _BASE):
        with pytest.raises(ProtocolError):
            found([block("disk-root", nonsense)])


def test_deleted_unless_it_is_kept(folder: VmFolder) -> None:
    folder.make_disks()
    one = chain(folder.disks, "root.qcow2")
    one.active.touch()
    folder.store(record(one))
    assert not folder.keeps
    folder.remove()
    assert not folder.disks.exists()
    # Later calls do nothing.
    folder.remove(keep=False)


def test_kept_is_what_the_record_says_and_nothing_else(folder: VmFolder) -> None:
    folder.make_disks()
    one = chain(folder.disks, "root.qcow2", "root-3.qcow2", made=3)
    for name in ("root.qcow2", "root.qcow2.idx", "root-3.qcow2", "root-1.qcow2", "root-1.qcow2.idx", "swap.qcow2"):
        (folder.disks / name).touch()
    folder.store(record(one), keep=True)
    folder.remove()
    assert not folder.path.exists()
    left = {"root.qcow2", "root.qcow2.idx", "root-3.qcow2", "kept.json"}
    assert {path.name for path in folder.disks.iterdir()} == left

    again = VmFolder(folder.path.parent.parent, "one")
    kept = again.kept()
    assert kept is not None
    assert kept.chain == one
    assert kept.base.digest == 7
    (again.disks / "kept.json").write_text("{}")
    with pytest.raises(HostError, match="--delete-disks"):
        again.kept()
    again.remove(keep=False)
    assert not again.disks.exists()


@pytest.mark.parametrize(
    ("command", "arguments", "says"),
    [
        ("block-commit", {"device": "x", "base-node": "root"}, "frozen layer"),
        ("blockdev-del", {"node-name": "root"}, "frozen layer"),
        ("block-commit", {"device": "root-1", "base-node": "middle"}, "hvaqemu freeze"),
        ("block-stream", {"device": "disk-root"}, "hvaqemu freeze"),
        ("transaction", {"actions": [{"type": "blockdev-snapshot", "data": {"node": "root-1"}}]}, "hvaqemu freeze"),
        ("transaction", {"actions": [{"type": "block-dirty-bitmap-add", "data": {"node": "root"}}]}, "frozen layer"),
        ("x-blockdev-x", {"node": {"deep": ["root"]}}, "frozen layer"),
        ("query-block", {"node": "root"}, ""),
        ("snapshot-save", {"vmstate": "root-1", "devices": ["root-1"]}, ""),
        ("drive-backup", {"device": "disk-root", "format": "qcow2", "target": "/t"}, ""),
    ],
)
def test_what_the_monitor_keeps_its_hands_off(command: str, arguments: dict[str, object], says: str) -> None:
    reason = refusal(command, arguments, [chain(Path("/v"), "root.qcow2", "root-1.qcow2")])
    assert (says in reason) if says else reason == ""
