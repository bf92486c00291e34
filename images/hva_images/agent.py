"""The guest agent as one file: a zip archive that Python runs, byte for byte reproducible."""

from __future__ import annotations

import ast
import importlib.util
import io
import sys
import zipfile
from pathlib import Path

from hvaqemu.errors import HostError

_MAIN = b"from hva_guest.__main__ import main\n\nraise SystemExit(main())\n"
_SHEBANG = b"#!/usr/bin/env python3\n"


def agent_sources() -> dict[str, bytes]:
    """The agent's source files by their path in the archive: its package, and what it imports of hvaqemu.

    :raise HostError: they are not where Python finds packages.
    """
    files: dict[str, bytes] = {"__main__.py": _MAIN}
    for directory in _locations("hva_guest"):
        for path in directory.rglob("*.py"):
            files[f"hva_guest/{path.relative_to(directory)}"] = path.read_bytes()
    ground = {path.stem: path for directory in _locations("hvaqemu") for path in directory.glob("*.py")}
    todo = ["__init__", *(name for source in files.values() for name in _ground_imports(source))]
    while todo:
        name = todo.pop()
        if name in ground and (where := f"hvaqemu/{name}.py") not in files:
            files[where] = ground[name].read_bytes()
            todo += _ground_imports(files[where])
    return dict(sorted(files.items()))


def _ground_imports(source: bytes) -> list[str]:
    """Names of the modules of package hvaqemu that ``source`` imports."""
    found: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and not node.level:
            module = node.module or ""
            names = [module] if module != "hvaqemu" else [f"hvaqemu.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        found += [name.split(".")[1] for name in names if name.startswith("hvaqemu.")]
    return found


def _locations(package: str) -> list[Path]:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise HostError(f"Python finds no package {package}", "install hvaqemu with pip, or again")
    return [Path(place) for place in spec.submodule_search_locations]


def build_agent(sources: dict[str, bytes], guest_python: tuple[int, int]) -> bytes:
    """The archive made of ``sources``.

    Where the guest's Python has the version of this one, compiled modules are put beside the sources: compiling takes
    the guest longer than running them, and code objects do not depend on the architecture.
    """
    files = dict(sources)
    if sys.version_info[:2] == guest_python:
        files |= {f"{name}c": _compiled(name, source) for name, source in sources.items() if name != "__main__.py"}
    out = io.BytesIO()
    out.write(_SHEBANG)
    with zipfile.ZipFile(out, "a", zipfile.ZIP_STORED) as archive:
        for name in sorted(files):
            info = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
            info.external_attr = 0o644 << 16
            info.create_system = 3
            archive.writestr(info, files[name])
    return out.getvalue()


def _compiled(name: str, source: bytes) -> bytes:
    code = compile(source, f"/usr/lib/hva/agent.pyz/{name}", "exec", dont_inherit=True, optimize=0)
    # Python's own writer of .pyc files with a hash in place of a time; unchecked, as nobody edits inside the archive.
    to_pyc = importlib._bootstrap_external._code_to_hash_pyc  # type: ignore[attr-defined]
    return bytes(to_pyc(code, importlib.util.source_hash(source), False))
