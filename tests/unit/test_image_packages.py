"""Packages as files: what is in them, whether their scripts matter, what dpkg is told of them."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from hva_images import base
from hva_images.debs import parse_control, read_deb
from hva_images.dpkg_database import installed, write_database
from hva_images.firstboot import steps
from hva_images.scripts import file_interests, why_scripts_matter
from hva_images.tree import Tree
from hvaqemu.errors import HostError
from tests.unit.image_stand_ins import make_deb

_DH = "# Automatically added by {tool}/13.11\n{text}# End automatically added section\n"


def script(text: str) -> str:
    return f"#!/bin/sh\nset -e\n{text}\nexit 0\n"


def test_a_package_is_read(tmp_path: Path) -> None:
    fields = "Depends: libc6 (>= 2.36), a | b:any, c [s390x]\nPre-Depends: d\n"
    path = make_deb(
        tmp_path,
        fields=fields,
        info={"postinst": script("echo"), "conffiles": "/etc/thing\n"},
        files={"/etc/thing": "x", "/usr/bin/thing": "odd"},
        links={"/usr/bin/other": "thing"},
    )
    deb = read_deb(path)
    assert (deb.name, deb.version, deb.info_name) == ("thing", "1.0-1", "thing")
    assert deb.relations("Depends") == ["libc6", "a", "b", "c"]
    assert deb.relations("Pre-Depends") == ["d"]
    assert deb.relations("Breaks") == []
    assert deb.script("conffiles") == "/etc/thing\n"
    assert deb.control["Description"] == "made for a test\n of several\n .\n lines"
    listed = [member.path for member in deb.members]
    assert listed == ["/", "/etc", "/etc/thing", "/usr", "/usr/bin", "/usr/bin/thing", "/usr/bin/other"]
    thing = deb.members[5]
    assert (thing.mode, thing.gid, thing.size, thing.is_dir, thing.is_link) == (0o640, 42, 3, False, False)
    assert deb.members[6].is_link
    assert deb.installed_bytes >= 2 * 4096


def test_dpkg_agrees_that_it_is_a_package(tmp_path: Path) -> None:
    path = make_deb(tmp_path, files={"/usr/bin/thing": "x"})
    listed = subprocess.run(["dpkg-deb", "--contents", path], capture_output=True, text=True, check=True).stdout
    assert "./usr/bin/thing" in listed


@pytest.mark.parametrize("content", [b"", b"!<arch>\n", b"!<arch>\nnonsense" + b" " * 60, b"no package at all"])
def test_what_is_no_package_is_said(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.deb"
    path.write_bytes(content)
    with pytest.raises(HostError, match=r"broken\.deb"):
        read_deb(path)


def test_a_cut_package_is_said(tmp_path: Path) -> None:
    path = make_deb(tmp_path, files={"/usr/bin/thing": "x" * 100_000})
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(HostError, match="not a package"):
        read_deb(path)


@pytest.mark.parametrize(
    "postinst",
    [
        script(""),
        script("# only a comment"),
        script('case "$1" in\n  configure)\n  ;;\n  abort-upgrade|abort-remove|abort-deconfigure)\n  ;;\n  *)\n'
               "    echo \"postinst called with unknown argument '$1'\" >&2\n    exit 1\n  ;;\nesac"),
        script(_DH.format(tool="dh_installsystemd", text='if [ "$1" = configure ]; then\n\tsystemctl start x\nfi\n')),
        script(_DH.format(tool="dh_python3", text="if command -v py3compile; then\n\tpy3compile -p x\nfi\n")
               + _DH.format(tool="dh_installinit", text="update-rc.d x defaults\n")),
        script("dpkg-maintscript-helper rm_conffile /etc/x 1.0~ -- \"$@\""),
        script("dpkg-maintscript-helper \\\n  symlink_to_dir /usr/share/doc/x y 1.0~ -- \"$@\""),
        "#!/bin/sh -e\nldconfig\n",
    ],
)  # fmt: skip
def test_scripts_that_do_nothing_here(tmp_path: Path, postinst: str) -> None:
    assert why_scripts_matter(read_deb(make_deb(tmp_path, info={"postinst": postinst}))) == ""


@pytest.mark.parametrize(
    ("name", "text", "shown"),
    [
        ("postinst", script("adduser --system thing"), "its postinst has: adduser --system thing"),
        ("preinst", script("dpkg-divert --add /bin/x"), "its preinst has: dpkg-divert"),
        ("postinst", script(_DH.format(tool="dh_sysuser", text="useradd x\n")), "useradd x"),
        ("postinst", "#!/usr/bin/perl\nexit 0;\n", "#!/usr/bin/perl"),
        ("postinst", "\x7fELF", "\x7fELF"),
        ("postinst", script('if [ "$1" = configure ]; then\n  mkdir /var/lib/x\nfi'), "if ["),
        ("postinst", script("true; rm -rf /x"), "true; rm"),
    ],
)
def test_scripts_that_matter_say_why(tmp_path: Path, name: str, text: str, shown: str) -> None:
    assert shown in why_scripts_matter(read_deb(make_deb(tmp_path, info={name: text})))


def test_files_that_others_act_on_matter(tmp_path: Path) -> None:
    owner = read_deb(make_deb(tmp_path, "owner", info={"triggers": "interest-noawait /usr/share/shells.d\n"}))
    assert file_interests(owner) == ["/usr/share/shells.d"]
    one = read_deb(make_deb(tmp_path, "one", files={"/usr/share/shells.d/fish": "x"}))
    assert why_scripts_matter(one) == ""
    assert "/usr/share/shells.d/fish" in why_scripts_matter(one, file_interests(owner))
    two = read_deb(make_deb(tmp_path, "two", files={"/etc/ld.so.conf.d/two.conf": "x"}))
    assert "/etc/ld.so.conf.d/two.conf" in why_scripts_matter(two)


@pytest.mark.parametrize(
    "name", ["libc6", "python3.11", "python3.13-minimal", "libpython3.11-minimal", "linux-image-s390x"]
)
def test_packages_the_builder_knows(name: str) -> None:
    assert base.configured(name)


@pytest.mark.parametrize("name", ["fio", "python3.11-venv", "libpython3.11-stdlib", "adduser", "libc6-extra"])
def test_packages_the_builder_does_not_know(name: str) -> None:
    assert not base.configured(name)


def test_steps_put_first_what_is_depended_on_before_unpacking(tmp_path: Path) -> None:
    needs = {"a": "Pre-Depends: b, outside\n", "b": "Pre-Depends: c\n", "c": "", "d": "Depends: a\n"}
    debs = [read_deb(make_deb(tmp_path, name, fields=fields)) for name, fields in needs.items()]
    assert [[deb.name for deb in step] for step in steps(debs)] == [["c", "d"], ["b"], ["a"]]
    circle = [read_deb(make_deb(tmp_path, x, fields=f"Pre-Depends: {y}\n")) for x, y in (("x", "y"), ("y", "x"))]
    assert sorted(deb.name for step in steps(circle) for deb in step) == ["x", "y"]


def test_dpkg_reads_the_database(tmp_path: Path) -> None:
    tree = Tree(tmp_path / "tree")
    tree.root.mkdir()
    tree.write("/etc/one", "configured\n")
    debs = [
        read_deb(
            make_deb(
                tmp_path,
                "one",
                info={
                    "conffiles": "/etc/one\n",
                    "triggers": "interest /usr/share/x\ninterest-noawait y\n",
                    "md5sums": "",
                },
                files={"/etc/one": "configured\n"},
            )
        ),
        read_deb(make_deb(tmp_path, "two", fields="Depends: one\n", info={"postinst": script("")})),
    ]
    write_database(tree, debs)
    admin = tree.root / "var/lib/dpkg"

    def dpkg(program: str, *words: str) -> str:
        argv = [program, f"--admindir={admin}", *words]
        return subprocess.run(argv, capture_output=True, text=True, check=True).stdout

    assert dpkg("dpkg-query", "-W", "-f", "${Package} ${db:Status-Status} ${Version}\n") == (
        "one installed 1.0-1\ntwo installed 1.0-1\n"
    )
    assert dpkg("dpkg-query", "-L", "one").split() == ["/.", "/etc", "/etc/one"]
    assert dpkg("dpkg-query", "-W", "-f", "${Conffiles}", "one").split()[0] == "/etc/one"
    assert dpkg("dpkg-query", "-S", "/etc/one").strip() == "one: /etc/one"
    assert dpkg("dpkg", "--audit") == ""
    assert (admin / "info/two.postinst").read_text() == script("")
    assert tree.attributes["/var/lib/dpkg/info/two.postinst"].mode == 0o755
    assert (admin / "triggers/File").read_text() == "/usr/share/x one\n"
    assert (admin / "triggers/y").read_text() == "one/noawait\n"
    status = (admin / "status").read_text()
    assert installed(status) == {"one": True, "two": True}
    assert installed(status.replace("install ok installed", "install ok half-configured", 1)) == {
        "one": False,
        "two": True,
    }


def test_control_keeps_continued_values() -> None:
    assert parse_control("A: 1\nB: x\n y\n .\nC:\n z\n") == {"A": "1", "B": "x\n y\n .", "C": "\n z"}
