"""Trees and file systems: nothing leaves the tree, and the file system has what the tree says."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hva_images.debs import Member
from hva_images.filesystem import make_ext4, read_file, replace_file, smallest_size
from hva_images.tree import Attributes, Tree
from hvaqemu.errors import ConfigError, HostError
from hvaqemu.units import MiB

_EPOCH = 1_700_000_000


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    (tmp_path / "tree/usr/bin").mkdir(parents=True)
    (tmp_path / "tree/bin").symlink_to("usr/bin")
    return Tree(tmp_path / "tree")


def debugfs(image: Path, command: str) -> str:
    done = subprocess.run(["/usr/sbin/debugfs", "-R", command, image], capture_output=True, text=True, check=True)
    return done.stdout


def test_links_in_directories_are_followed_inside(tree: Tree) -> None:
    tree.link("/usr/abs", "/usr/bin")
    tree.link("/up", "../../../../usr/bin")
    assert [tree.real(f"{path}/x") for path in ("/bin", "/usr/abs", "/up")] == ["/usr/bin/x"] * 3
    tree.write("/bin/sh", "text", 0o755)
    assert (tree.root / "usr/bin/sh").read_text() == "text"
    assert tree.attributes == {"/usr/bin/sh": Attributes(0o755)}


def test_a_link_itself_is_replaced_not_followed(tree: Tree, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_text("precious")
    (tree.root / "etc").mkdir()
    (tree.root / "etc/passwd").symlink_to(outside)
    tree.write("/etc/passwd", "mine")
    assert outside.read_text() == "precious"
    assert tree.read("/etc/passwd") == b"mine"


def test_a_circle_of_links_is_said(tree: Tree) -> None:
    tree.link("/a", "b")
    tree.link("/b", "a")
    for use in (lambda: tree.write("/a/x", ""), lambda: tree.directory("/b"), lambda: tree.read("/a")):
        with pytest.raises(ConfigError, match="circle"):
            use()


def test_a_link_out_of_the_tree_is_followed_inside(tree: Tree, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    tree.link("/var/run", str(tmp_path / "outside"))
    tree.write("/var/run/x/y", "inside")
    assert list((tmp_path / "outside").iterdir()) == []
    assert tree.read(f"{tmp_path}/outside/x/y") == b"inside"
    assert tree.read("/var/run/x/y") == b"inside"


def test_what_is_in_the_way_is_said(tree: Tree) -> None:
    tree.write("/etc/passwd", "")
    with pytest.raises(ConfigError, match="/etc/passwd: is not a directory"):
        tree.write("/etc/passwd/x", "")
    with pytest.raises(ConfigError, match="/usr/bin: is a directory"):
        tree.install("/usr/bin", Path("/dev/null"), 0o644)


_PARTS = st.lists(st.sampled_from(["a", "b", "c", "..", "."]), min_size=1, max_size=5).map("/".join)


@settings(max_examples=60)
@given(links=st.dictionaries(st.sampled_from("abc"), st.tuples(st.booleans(), _PARTS)), path=_PARTS)
def test_no_links_lead_out(
    tmp_path_factory: pytest.TempPathFactory, links: dict[str, tuple[bool, str]], path: str
) -> None:
    root = tmp_path_factory.mktemp("tree")
    for name, (absolute, target) in links.items():
        (root / name).symlink_to(("/" if absolute else "") + target)
    try:
        real = Tree(root).real("/" + path)
    except ConfigError:
        return
    assert ".." not in real.split("/")
    if real == "/":
        return
    parent = (root / real.lstrip("/")).parent
    assert not parent.exists() or parent.resolve().is_relative_to(root.resolve())


def test_sweep_leaves_what_is_known(tree: Tree) -> None:
    for path in ("/usr/bin/keep", "/usr/bin/drop", "/var/cache/apt/drop"):
        tree.write(path, "")
    member = Member("/bin/keep", 0o4755, 0, 7, 0, 0, False, False)
    tree.claim([member])
    assert tree.attributes["/usr/bin/keep"] == Attributes(0o4755, 0, 7)
    tree.sweep({"/bin", "/usr", "/usr/bin", "/usr/bin/keep"})
    assert list(tree.walk()) == ["/bin", "/usr", "/usr/bin", "/usr/bin/keep"]


def fill(tree: Tree, names: list[str]) -> None:
    for name in names:
        tree.write(f"/d/{name}", name.encode() * 3000, 0o4750, gid=42)
        os.utime(tree.root / "d" / name, (5, 2_000_000_000))
    tree.link("/d/link", 'a b/"quoted"')
    tree.write("/d/empty", "")
    (tree.root / "d/twin").hardlink_to(tree.root / "d/empty")


def test_the_file_system_has_what_the_tree_says(tree: Tree, tmp_path: Path) -> None:
    names = ["plain", "with space", 'quo"te', "back\\slash", "ünïcode", "#hash", "-dash"]
    fill(tree, names)
    image = tmp_path / "image with, comma.ext4"
    make_ext4(tree, image, size=64 * MiB, label="test", epoch=_EPOCH)
    assert image.stat().st_size == 64 * MiB
    for name in names:
        assert read_file(image, f"/d/{name}") == name.encode() * 3000, name
    facts = debugfs(image, "stat /d/plain")
    assert "Mode:  04750" in facts
    assert "User:     0   Group:    42" in facts
    assert f"mtime: 0x{_EPOCH:08x}" in facts
    assert f"ctime: 0x{_EPOCH:08x}" in facts
    assert 'Fast link dest: "a b/"quoted""' in debugfs(image, "stat /d/link")
    assert "Links: 2" in debugfs(image, "stat /d/twin")
    assert "Mode:  0755" in debugfs(image, "stat /usr/bin")


def test_the_same_tree_gives_the_same_bytes(tmp_path: Path) -> None:
    names = [f"file{number}" for number in range(300)]
    images = []
    for turn, order in enumerate((names, names[::-1])):
        tree = Tree(tmp_path / f"tree{turn}")
        tree.root.mkdir()
        fill(tree, order)
        images.append(tmp_path / f"image{turn}")
        make_ext4(tree, images[-1], size=64 * MiB, label="test", epoch=_EPOCH)
    assert images[0].read_bytes() == images[1].read_bytes()


def test_a_file_is_replaced(tree: Tree, tmp_path: Path) -> None:
    fill(tree, ["plain"])
    image, content = tmp_path / "image", tmp_path / "new content"
    make_ext4(tree, image, size=64 * MiB, label="test", epoch=_EPOCH)
    content.write_bytes(os.urandom(100_000))
    replace_file(image, "/d/plain", content, _EPOCH)
    assert read_file(image, "/d/plain") == content.read_bytes()
    assert "Mode:  0644" in debugfs(image, "stat /d/plain")
    content.write_bytes(bytes(range(256)) * (80 * MiB // 256))
    with pytest.raises(HostError, match="replacing /d/plain"):
        replace_file(image, "/d/plain", content, _EPOCH)


def test_the_smallest_size_is_enough(tree: Tree, tmp_path: Path) -> None:
    for number in range(200):
        tree.write(f"/d/{number}", os.urandom(150_000))
    make_ext4(tree, tmp_path / "image", size=smallest_size(tree), label="test", epoch=_EPOCH)
    assert smallest_size(tree, 10 * MiB) >= smallest_size(tree) + 10 * MiB


def test_what_is_no_file_is_refused(tree: Tree, tmp_path: Path) -> None:
    os.mkfifo(tree.root / "pipe")
    with pytest.raises(HostError, match="/pipe: is neither"):
        make_ext4(tree, tmp_path / "image", size=64 * MiB, label="test", epoch=_EPOCH)
