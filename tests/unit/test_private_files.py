"""What is written is its owner's alone, whatever the umask, and what guests print is harmless where it is kept."""

from __future__ import annotations

import json
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from hva_host.agent.layer_watch import FilePrint, LayerContent
from hva_host.agent.records import VmFolder, VmRecord, names
from hva_host.report.files import report_folder, report_json, write_json
from hvaqemu.config import VmConfig
from hvaqemu.errors import ConfigError, HostError
from hvaqemu.fields import absolute
from hvaqemu.paths import cache_dir, private_folder, runtime_dir, state_dir
from hvaqemu.units import MiB
from tests.unit.test_report_rendering import a_report


@pytest.fixture(autouse=True)
def open_umask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("RUNTIME", "CACHE", "STATE"):
        monkeypatch.setenv(f"HVAQEMU_{name}_DIR", f"{tmp_path}/{name[0]}/deep")
    before = os.umask(0)
    yield
    os.umask(before)


def modes(path: Path) -> dict[str, str]:
    return {str(each.relative_to(path)): stat.filemode(each.stat().st_mode) for each in path.rglob("*")}


def test_folders_and_what_is_missing_above_them(tmp_path: Path) -> None:
    private_folder(tmp_path / "a/b/c")
    (tmp_path / "d").mkdir()
    private_folder(tmp_path / "d/e")
    assert modes(tmp_path) == dict.fromkeys(("a", "a/b", "a/b/c", "d/e"), "drwx------") | {"d": "drwxrwxrwx"}
    with pytest.raises(NotADirectoryError):
        (tmp_path / "file").touch()
        private_folder(tmp_path / "file/below")


def test_places_of_vms(tmp_path: Path) -> None:
    for place in (cache_dir(), state_dir()):
        assert stat.filemode(place.stat().st_mode) == "drwx------"
    folder = VmFolder(tmp_path, "one")
    content = LayerContent(FilePrint(1, 2, 3, 4, 5), 6, 7)
    record = VmRecord(
        config=VmConfig(name="one", memory=256 * MiB),
        qemu_pid=1,
        qemu_start_time=2,
        layers=((Path("/image"), Path("/index")),),
        contents=(content,),
    )
    folder.store(record)
    folder.make_disks()
    assert folder.load() == record
    assert names(tmp_path) == ["one"]
    assert all("------" in mode for mode in modes(tmp_path).values()), modes(tmp_path)
    folder.remove()


def test_reports(tmp_path: Path) -> None:
    folder = report_folder(tmp_path / "x/report")
    evil = a_report().model_copy(update={"saved": {"said": "\x1b[2J\x9b2J\u202e\x7f\u00e9"}})
    write_json(evil, folder / "report.json")
    text = (folder / "report.json").read_text()
    assert text.isascii()
    assert not {"\x1b", "\x7f"} & set(text)
    assert json.loads(text)["saved"]["said"] == "\x1b[2J\x9b2J\u202e\x7f\u00e9"
    assert json.loads(report_json(evil)) == json.loads(text)
    assert modes(tmp_path / "x") == {"report": "drwx------", "report/report.json": "-rw-------"}
    # A file that is there was made by its owner as he wants it.
    (folder / "report.json").chmod(0o644)
    write_json(evil, folder / "report.json")
    assert modes(folder) == {"report.json": "-rw-r--r--"}


def test_a_runtime_directory_that_is_there_is_closed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="hvp", dir="/tmp") as short:
        place = Path(short) / "r"
        place.mkdir(mode=0o777)
        monkeypatch.setenv("HVAQEMU_RUNTIME_DIR", str(place))
        assert runtime_dir() == place
        assert stat.filemode(place.stat().st_mode) == "drwx------"
        # What is there for everybody's files stays that.
        place.chmod(0o1777)
        with pytest.raises(HostError, match=f"{place}: is shared by all users"):
            runtime_dir()
        assert stat.S_IMODE(place.stat().st_mode) == 0o1777


def test_where_no_home_is_known_a_place_that_is_said_is_enough(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def nowhere(_path: Path) -> Path:
        raise RuntimeError("no home")

    monkeypatch.setattr(Path, "expanduser", nowhere)
    monkeypatch.setattr(os, "geteuid", os.getuid)
    monkeypatch.setenv("HVAQEMU_CACHE_DIR", str(tmp_path / "cache"))
    assert cache_dir() == tmp_path / "cache"
    with pytest.raises(ConfigError, match="no home directory is known for ~nobody"):
        absolute(tmp_path, Path("~nobody/disk.raw"))
