"""dpkg's database for packages that were unpacked without it, so that dpkg in the guest knows what is there.

The formats are dpkg's own (deb-triggers(5), dpkg-query(1), and dpkg's lib/dpkg/dump.c for the order of fields, which is
free). Paths stay as the packages have them: dpkg knows of links in place of /bin, /lib and /sbin.
"""

from __future__ import annotations

import hashlib

from hva_images.debs import Deb
from hva_images.scripts import interests
from hva_images.tree import Tree

ADMIN = "/var/lib/dpkg"
_EXECUTABLE = ("preinst", "postinst", "prerm", "postrm", "config")


def write_database(tree: Tree, debs: list[Deb]) -> None:
    """Record ``debs``, whose files are in ``tree``, as installed."""
    for directory in ("info", "updates", "triggers", "parts", "alternatives"):
        tree.directory(f"{ADMIN}/{directory}")
    tree.write(f"{ADMIN}/info/format", "1\n")
    tree.write(f"{ADMIN}/status", "".join(_stanza(tree, deb) for deb in sorted(debs, key=lambda deb: deb.info_name)))
    for name in ("available", "diversions", "statoverride", "triggers/Unincorp"):
        tree.default(f"{ADMIN}/{name}", "")
    for deb in debs:
        stem = f"{ADMIN}/info/{deb.info_name}"
        paths = ["/.", *(member.path for member in deb.members if member.path != "/")]
        tree.write(f"{stem}.list", "".join(f"{path}\n" for path in paths))
        for name, content in {"md5sums": _sums(tree, deb), **deb.info}.items():
            tree.write(f"{stem}.{name}", content, 0o755 if name in _EXECUTABLE else 0o644)
    _write_triggers(tree, debs)


def _stanza(tree: Tree, deb: Deb) -> str:
    fields = {"Package": deb.name, "Status": "install ok installed", **deb.control}
    lines = [f"{name}: {value}" for name, value in fields.items()]
    conffiles = [line.split()[-1] for line in deb.script("conffiles").splitlines() if line.strip()]
    present = [path for path in conffiles if tree.exists(path)]
    if present:
        sums = "".join(f"\n {path} {hashlib.md5(tree.read(path)).hexdigest()}" for path in present)
        lines.append(f"Conffiles:{sums}")
    return "\n".join(lines) + "\n\n"


def _sums(tree: Tree, deb: Deb) -> bytes:
    """What dpkg writes for a package that brings no ``md5sums`` of its own."""
    if "md5sums" in deb.info:
        return b""
    conffiles = deb.script("conffiles").split()
    plain = [member.path for member in deb.members if not member.is_dir and not member.is_link]
    listed = [path for path in plain if path not in conffiles and tree.exists(path)]
    return "".join(f"{hashlib.md5(tree.read(path)).hexdigest()}  {path[1:]}\n" for path in listed).encode()


def _write_triggers(tree: Tree, debs: list[Deb]) -> None:
    by_file: list[str] = []
    by_name: dict[str, list[str]] = {}
    for deb in debs:
        for trigger, awaited in interests(deb):
            who = deb.info_name if awaited else f"{deb.info_name}/noawait"
            if trigger.startswith("/"):
                by_file.append(f"{trigger} {who}\n")
            else:
                by_name.setdefault(trigger, []).append(f"{who}\n")
    tree.write(f"{ADMIN}/triggers/File", "".join(by_file))
    for name, lines in by_name.items():
        tree.write(f"{ADMIN}/triggers/{name}", "".join(lines))


def installed(status: str) -> dict[str, bool]:
    """Of dpkg's file ``status``: each package, and whether it is installed and configured."""
    found: dict[str, bool] = {}
    for stanza in status.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in stanza.splitlines() if ": " in line and not line[0].isspace())
        if "Package" in fields:
            found[fields["Package"]] = fields.get("Status") == "install ok installed"
    return found
