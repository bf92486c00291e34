"""Debian packages made for tests."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path


def make_deb(
    folder: Path,
    name: str = "thing",
    *,
    fields: str = "",
    info: dict[str, str] | None = None,
    files: dict[str, str] | None = None,
    links: dict[str, str] | None = None,
) -> Path:
    """A package of architecture all. ``fields`` are further lines of its control file."""
    control = f"Package: {name}\nVersion: 1.0-1\nArchitecture: all\nMaintainer: Nobody <n@example.org>\n{fields}"
    control += "Description: made for a test\n of several\n .\n lines\n"
    inside = {"./control": control, **{f"./{key}": text for key, text in (info or {}).items()}}
    sections = {
        "debian-binary": b"2.0\n",
        "control.tar.xz": _tar(inside, {}),
        "data.tar.xz": _tar({f".{path}": text for path, text in (files or {}).items()}, links or {}),
    }
    path = folder / f"{name}_1.0-1_all.deb"
    with path.open("wb") as file:
        file.write(b"!<arch>\n")
        for section, content in sections.items():
            file.write(f"{section:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode())
            file.write(content + b"\n" * (len(content) % 2))
    return path


def _tar(files: dict[str, str], links: dict[str, str]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:xz") as archive:
        made = {"./"}
        _directory(archive, "./")
        for name, text in files.items():
            for parent in reversed([str(parent) for parent in Path(name).parents][:-1]):
                if parent not in made:
                    made.add(parent)
                    _directory(archive, f"./{parent}")
            entry = tarfile.TarInfo(name)
            entry.size = len(text.encode())
            script = name.removeprefix("./") in ("preinst", "postinst")
            entry.mode, entry.mtime, entry.gid = 0o755 if script else 0o640, 1_600_000_000, 42
            archive.addfile(entry, io.BytesIO(text.encode()))
        for name, target in links.items():
            entry = tarfile.TarInfo(f".{name}")
            entry.type, entry.linkname = tarfile.SYMTYPE, target
            archive.addfile(entry)
    return out.getvalue()


def _directory(archive: tarfile.TarFile, name: str) -> None:
    entry = tarfile.TarInfo(name)
    entry.type, entry.mode = tarfile.DIRTYPE, 0o755
    archive.addfile(entry)
