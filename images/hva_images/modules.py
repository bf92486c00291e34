"""Kernel modules: what each needs and answers to, written the way depmod writes it, without running depmod.

Facts are taken from each module's ``.modinfo`` section, whose entries are ``key=value`` texts ending in NUL.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from pathlib import Path

from hvaqemu.errors import HostError

_ENTRY = re.compile(rb"\0(depends|alias|softdep)=([^\0]*)(?=\0)")


@dataclass(frozen=True)
class Module:
    """``path`` is relative to the directory of the kernel release; names have no dashes."""

    path: str
    depends: tuple[str, ...]
    aliases: tuple[str, ...]
    softdeps: tuple[str, ...]


def module_name(text: str) -> str:
    """The name a module has in the kernel: ``virtio-rng.ko`` is ``virtio_rng``."""
    return text.split("/")[-1].split(".ko")[0].replace("-", "_")


def read_modules(directory: Path) -> dict[str, Module]:
    """All modules below ``directory`` (``/lib/modules/RELEASE``), by name, in order of their paths."""
    found: dict[str, Module] = {}
    for path in sorted(directory.rglob("*.ko")):
        facts: dict[bytes, list[str]] = {b"depends": [], b"alias": [], b"softdep": []}
        # Consecutive entries share a NUL, which the lookahead leaves for the next match.
        for key, value in _ENTRY.findall(path.read_bytes()):
            facts[key].append(value.decode(errors="replace"))
        depends = [module_name(name) for text in facts[b"depends"] for name in text.split(",") if name]
        found[module_name(path.name)] = Module(
            str(path.relative_to(directory)), tuple(depends), tuple(facts[b"alias"]), tuple(facts[b"softdep"])
        )
    return found


def load_order(modules: dict[str, Module], wanted: list[str], builtin: set[str]) -> list[Module]:
    """``wanted`` and all they need, each after what it needs.

    :raise HostError: a module is neither there nor built into the kernel.
    """
    order: list[str] = []

    def add(name: str, above: tuple[str, ...]) -> None:
        if name in order or name in builtin or name in above:
            return
        if name not in modules:
            raise HostError(f"the kernel package has no module {name}")
        for needed in modules[name].depends:
            add(needed, (*above, name))
        order.append(name)

    for name in wanted:
        add(name, ())
    return [modules[name] for name in order]


def builtin_modules(directory: Path) -> set[str]:
    """Names of what is built into the kernel."""
    listing = directory / "modules.builtin"
    return {module_name(line) for line in listing.read_text().splitlines()} if listing.exists() else set()


def write_indexes(directory: Path, modules: dict[str, Module]) -> None:
    """Write the files that modprobe reads: what depends on what, which module answers to which alias."""
    builtin = builtin_modules(directory)
    dep = dep_lines(modules, builtin)
    aliases = [(pattern.replace("-", "_"), name) for name, module in modules.items() for pattern in module.aliases]
    softdeps = [(name, text) for name, module in modules.items() for text in module.softdeps]
    # busybox reads the text, kmod the tries; each file must be there for kmod, be it empty.
    (directory / "modules.dep").write_text("".join(f"{line}\n" for line in dep.values()))
    (directory / "modules.alias").write_text("".join(f"alias {pattern} {name}\n" for pattern, name in aliases))
    (directory / "modules.softdep").write_text("".join(f"softdep {name} {text}\n" for name, text in softdeps))
    tries = {
        "dep": list(dep.items()),
        "alias": aliases,
        "symbols": [],
        "builtin": [(name, "") for name in sorted(builtin)],
        "builtin.alias": [],
    }
    for name, values in tries.items():
        (directory / f"modules.{name}.bin").write_bytes(trie(values))


def dep_lines(modules: dict[str, Module], builtin: set[str]) -> dict[str, str]:
    """Each module's line of ``modules.dep``, by its name."""
    lines: dict[str, str] = {}
    for name, module in modules.items():
        needed = [each.path for each in reversed(load_order(modules, [name], builtin)[:-1])]
        lines[name] = f"{module.path}:{''.join(' ' + path for path in needed)}"
    return lines


_TRIE_MAGIC = 0xB007F457
_TRIE_VERSION = 0x00020001
_WITH_PREFIX, _WITH_VALUES, _WITH_CHILDREN = 0x80000000, 0x40000000, 0x20000000


def trie(values: list[tuple[str, str]]) -> bytes:
    """``values`` (key, value) as one of kmod's index files (kmod, libkmod/libkmod-index.h).

    Numbers are big-endian on every machine. A value's priority is its place in ``values``: the first match wins.
    """
    out = bytearray(struct.pack(">III", _TRIE_MAGIC, _TRIE_VERSION, 0))
    entries = sorted(
        (key.encode("ascii", "replace"), place, value.encode()) for place, (key, value) in enumerate(values)
    )
    root = _write_node(out, entries, 0)
    struct.pack_into(">I", out, 8, root)
    return bytes(out)


def _write_node(out: bytearray, entries: list[tuple[bytes, int, bytes]], depth: int) -> int:
    """Append the node that holds ``entries``, whose keys are equal up to ``depth``; its offset and flags."""
    first, last = (entries[0][0], entries[-1][0]) if entries else (b"", b"")
    end = depth
    while end < min(len(first), len(last)) and first[end] == last[end]:
        end += 1
    here = [entry for entry in entries if len(entry[0]) == end]
    below: dict[int, list[tuple[bytes, int, bytes]]] = {}
    for entry in entries[len(here) :]:
        below.setdefault(entry[0][end], []).append(entry)
    children = {letter: _write_node(out, group, end + 1) for letter, group in below.items()}
    offset = len(out)
    if first[depth:end]:
        out += first[depth:end] + b"\0"
        offset |= _WITH_PREFIX
    if children:
        low, high = min(children), max(children)
        out += bytes((low, high))
        out += b"".join(struct.pack(">I", children.get(letter, 0)) for letter in range(low, high + 1))
        offset |= _WITH_CHILDREN
    if here:
        out += struct.pack(">I", len(here))
        out += b"".join(struct.pack(">I", place) + value + b"\0" for _, place, value in here)
        offset |= _WITH_VALUES
    return offset
