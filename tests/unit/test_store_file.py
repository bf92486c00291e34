"""Where a store that is a file can be, and what is said where it can not."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hva_host.agent.plan import store_file
from hva_host.memory import store_file as module
from hva_host.memory.store_file import make_store_file, store_identity
from hva_host.memory.waiting import in_memory
from hvaqemu.config import VmConfig, load_vm
from hvaqemu.errors import HostError
from hvaqemu.units import MiB


def refused(folder: Path, limit: int = MiB) -> HostError:
    with pytest.raises(HostError) as raised:
        make_store_file(folder, limit)
    assert raised.value.message.startswith(f"store.folder: {folder}: ")
    assert raised.value.hint
    assert "\n" not in str(raised.value)
    return raised.value


def test_no_folder(tmp_path: Path) -> None:
    assert "no such folder" in refused(tmp_path / "none").message
    (tmp_path / "file").write_text("")
    assert "no such folder" in refused(tmp_path / "file").message


def test_a_folder_in_memory() -> None:
    folder = Path("/dev/shm")
    if not in_memory(folder.stat().st_dev):
        pytest.skip("no file system in memory here")
    assert "in the host's memory" in refused(folder).message


def test_no_room(tmp_path: Path) -> None:
    room = os.statvfs(tmp_path)
    error = refused(tmp_path, (room.f_blocks + 1) * room.f_frsize)
    assert "has room for" in error.message
    assert "store.limit" in error.hint


def test_no_holes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def not_here(_fd: int, _offset: int, _length: int) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(module, "punch_hole", not_here)
    before = len(list(Path("/proc/self/fd").iterdir()))
    assert "can not be given back" in refused(tmp_path).message
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_the_message_names_the_vm(tmp_path: Path) -> None:
    config = VmConfig.model_validate({"name": "web", "memory": "128M", "store": {"folder": str(tmp_path / "none")}})
    with pytest.raises(HostError, match=r"^VM web: store\.folder: "):
        store_file(config)
    assert store_file(VmConfig.model_validate({"name": "web", "memory": "128M"})) is None


def test_a_relative_folder_is_beside_the_file(tmp_path: Path) -> None:
    (tmp_path / "vm.yaml").write_text("name: web\nmemory: 128M\nstore: {folder: pages, limit: 8M}\n")
    config = load_vm(tmp_path / "vm.yaml")
    assert config.store.folder == tmp_path / "pages"
    assert VmConfig.model_validate_json(config.model_dump_json()) == config


def test_a_memfd_that_says_nothing() -> None:
    fd = os.memfd_create("hva-store-at")
    assert store_identity(fd) == (0, 0)
    os.close(fd)
