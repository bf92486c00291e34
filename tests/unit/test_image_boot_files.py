"""What the guest starts from: indexes of kernel modules, the initramfs, the agent's archive."""

from __future__ import annotations

import ast
import random
import stat
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hva_images.agent import agent_sources, build_agent
from hva_images.initramfs import Entry, cpio, needed_libraries
from hva_images.modules import Module, dep_lines, load_order, module_name, read_modules, trie, write_indexes
from hvaqemu.errors import HostError

_MODULES = {
    "ext4": Module("kernel/fs/ext4.ko", ("jbd2", "crc16"), (), ()),
    "jbd2": Module("kernel/fs/jbd2.ko", ("crc16",), (), ()),
    "crc16": Module("kernel/lib/crc16.ko", (), (), ()),
    "odd": Module("kernel/odd.ko", ("builtin_one",), (), ()),
}


def look_up(index: bytes, key: str) -> list[str]:
    """Values of ``key`` in one of kmod's index files, read the way kmod does."""
    magic, version, node = struct.unpack_from(">III", index)
    assert (magic, version) == (0xB007F457, 0x00020001)
    rest = key.encode()
    while True:
        offset, children = node & 0x0FFFFFFF, {}
        if node & 0x80000000:
            end = index.index(b"\0", offset)
            prefix, offset = index[offset:end], end + 1
            if not rest.startswith(prefix):
                return []
            rest = rest[len(prefix) :]
        if node & 0x20000000:
            first, last = index[offset], index[offset + 1]
            numbers = struct.unpack_from(f">{last - first + 1}I", index, offset + 2)
            children = dict(zip(range(first, last + 1), numbers, strict=True))
            offset += 2 + 4 * len(numbers)
        if not rest:
            break
        node = children.get(rest[0], 0)
        if not node:
            return []
        rest = rest[1:]
    found = []
    if node & 0x40000000:
        (count,) = struct.unpack_from(">I", index, offset)
        offset += 4
        for _ in range(count):
            end = index.index(b"\0", offset + 4)
            found.append((struct.unpack_from(">I", index, offset)[0], index[offset + 4 : end].decode()))
            offset = end + 1
    assert found == sorted(found)
    return [value for _, value in found]


_TEXT = st.text(st.characters(min_codepoint=1, max_codepoint=127), max_size=6)


@given(st.lists(st.tuples(_TEXT, _TEXT), max_size=30), _TEXT)
def test_every_key_is_found_and_no_other(values: list[tuple[str, str]], other: str) -> None:
    index = trie(values)
    for key in {other, *(key for key, _ in values)}:
        assert look_up(index, key) == [value for each, value in values if each == key]


def test_modules_load_after_what_they_need() -> None:
    order = [module_name(module.path) for module in load_order(_MODULES, ["ext4", "odd"], {"builtin_one"})]
    assert order == ["crc16", "jbd2", "ext4", "odd"]
    assert dep_lines(_MODULES, {"builtin_one"})["ext4"] == ("kernel/fs/ext4.ko: kernel/fs/jbd2.ko kernel/lib/crc16.ko")
    with pytest.raises(HostError, match="builtin_one"):
        load_order(_MODULES, ["odd"], set())


def test_modules_are_read_from_their_files(tmp_path: Path) -> None:
    (tmp_path / "kernel").mkdir()
    info = (
        b"\x7fELF junk\0license=GPL\0alias=virtio:d00000002v*\0alias=virtio-blk\0depends=\0softdep=pre: x\0name=a_b\0"
    )
    (tmp_path / "kernel/a-b.ko").write_bytes(info)
    (tmp_path / "kernel/c.ko").write_bytes(b"\0depends=a-b,builtin\0")
    (tmp_path / "modules.builtin").write_text("kernel/built/builtin.ko\n")
    modules = read_modules(tmp_path)
    assert modules["a_b"] == Module("kernel/a-b.ko", (), ("virtio:d00000002v*", "virtio-blk"), ("pre: x",))
    write_indexes(tmp_path, modules)
    assert look_up((tmp_path / "modules.dep.bin").read_bytes(), "c") == ["kernel/c.ko: kernel/a-b.ko"]
    assert look_up((tmp_path / "modules.alias.bin").read_bytes(), "virtio_blk") == ["a_b"]
    assert look_up((tmp_path / "modules.builtin.bin").read_bytes(), "builtin") == [""]
    assert (tmp_path / "modules.dep").read_text() == "kernel/a-b.ko:\nkernel/c.ko: kernel/a-b.ko\n"


def read_cpio(archive: bytes) -> list[Entry]:
    found: list[Entry] = []
    at = 0
    while True:
        assert archive[at : at + 6] == b"070701"
        fields = [int(archive[at + 6 + 8 * n : at + 14 + 8 * n], 16) for n in range(13)]
        name = archive[at + 110 : at + 110 + fields[11] - 1].decode()
        data = at + (110 + fields[11] + 3) // 4 * 4
        if name == "TRAILER!!!":
            return found
        found.append(Entry(name, fields[1], archive[data : data + fields[6]], (fields[9], fields[10])))
        at = (data + fields[6] + 3) // 4 * 4


_NAMES = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=20)


@given(st.lists(st.builds(Entry, _NAMES, st.just(stat.S_IFREG | 0o644), st.binary(max_size=50)), max_size=8))
def test_cpio_holds_its_entries(entries: list[Entry]) -> None:
    archive = cpio(entries)
    assert len(archive) % 512 == 0
    assert read_cpio(archive) == entries


def test_needed_libraries_of_a_program_of_this_host() -> None:
    needed = needed_libraries(Path("/bin/sh").read_bytes())
    assert "libc.so.6" in needed
    assert any("ld" in Path(name).name for name in needed)
    with pytest.raises(HostError, match="ELF"):
        needed_libraries(b"#!/bin/sh\n")


def test_the_agent_runs_from_its_archive_alone(tmp_path: Path) -> None:
    archive = tmp_path / "agent.pyz"
    archive.write_bytes(build_agent(agent_sources(), (sys.version_info[0], sys.version_info[1])))
    done = subprocess.run([sys.executable, "-I", "-S", archive, "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "--allow-exec" in done.stdout


def test_the_agent_is_the_same_bytes_every_time() -> None:
    sources = agent_sources()
    shuffled = list(sources.items())
    random.Random(1).shuffle(shuffled)
    for version in ((sys.version_info[0], sys.version_info[1]), (3, 9)):
        assert build_agent(sources, version) == build_agent(dict(shuffled), version)


def test_the_agent_brings_only_what_it_imports() -> None:
    sources = agent_sources()
    assert {"__main__.py", "hva_guest/__main__.py", "hvaqemu/__init__.py", "hvaqemu/protocol.py"} <= sources.keys()
    for path, source in sources.items():
        for node in ast.walk(ast.parse(source)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            for name in names:
                top = name.split(".")[0]
                assert top in sys.stdlib_module_names | {"hva_guest", "hvaqemu"}, f"{path} imports {name}"
