"""Where packages come from: the host's own apt sources, as far as they are Debian's, as one deb822 text.

Only what is signed by a Debian archive key is used; whatever an entry says about trust is left out, so signatures are
always checked.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hvaqemu.errors import ConfigError, HostError

#: Names a file of apt sources (one-line or deb822) to use instead of the host's.
VARIABLE = "HVAQEMU_APT_SOURCES"
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"

_SUITE = re.compile(r"([a-z]+)(-updates|-security|-backports|/updates)?")
_LINE = re.compile(r"deb\s+(?:\[(?P<options>[^\]]*)\]\s+)?(?P<uri>\S+)\s+(?P<suite>\S+)\s+(?P<components>[^#]+)")
#: Options that loosen no check of signatures and that a snapshot of the archive needs.
_KEPT = ("check-valid-until", "check-date")


@dataclass(frozen=True)
class Entry:
    """One source: all of these suites of this archive."""

    uri: str
    suites: tuple[str, ...]
    components: tuple[str, ...]
    signed_by: str
    options: tuple[tuple[str, str], ...] = ()
    trusted: bool = False


@dataclass(frozen=True)
class Sources:
    """``text`` is a deb822 file; ``suite`` is the release it is for ("bookworm")."""

    suite: str
    text: str


def load_sources(root: Path = Path("/")) -> Sources:
    """The sources to build from, of the host whose files are below ``root``.

    :raise HostError: the host has no Debian sources.
    :raise ConfigError: the file that ``HVAQEMU_APT_SOURCES`` names can not be used.
    """
    if chosen := os.environ.get(VARIABLE):
        path = Path(chosen)
        entries = list(_read(path))
        if not entries:
            raise ConfigError(f"{path}: no apt sources in it", f"correct {VARIABLE}")
        if any(entry.trusted for entry in entries):
            raise ConfigError(f"{path}: switches the check of signatures off (trusted, allow-insecure)", "remove that")
    else:
        found = [entry for path in _files(root / "etc/apt") for entry in _read(path)]
        entries = [entry for entry in found if _is_debian(entry)]
        if not entries:
            raise HostError("apt's sources on this host hold no Debian archive", f"name a file of them in {VARIABLE}")
    release = _release(entries, root)
    return Sources(release, "\n".join(_format(entry, release) for entry in entries if _of(entry, release)))


def _files(directory: Path) -> Iterator[Path]:
    one = directory / "sources.list"
    if one.is_file():
        yield one
    more = directory / "sources.list.d"
    if more.is_dir():
        yield from sorted(path for path in more.iterdir() if path.suffix in (".list", ".sources"))


def _read(path: Path) -> Iterator[Entry]:
    try:
        text = path.read_text(errors="replace")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    if re.search(r"^types:", text, re.IGNORECASE | re.MULTILINE):
        for stanza in re.split(r"\n\s*\n", text):
            yield from _stanza(stanza)
        return
    for line in text.splitlines():
        if match := _LINE.fullmatch(line.split("#")[0].strip()):
            words = [word.partition("=") for word in (match["options"] or "").split()]
            options = {name.lower(): value for name, _, value in words}
            yield _entry(match["uri"], [match["suite"]], match["components"].split(), options)


def _stanza(text: str) -> Iterator[Entry]:
    fields: dict[str, str] = {}
    name = ""
    for line in text.splitlines():
        if line.startswith("#") or not line.strip():
            continue
        if line[0].isspace():
            if name:
                fields[name] += "\n" + line.strip()
            continue
        key, _, value = line.partition(":")
        name = key.strip().lower()
        fields[name] = value.strip()
    if "deb" not in fields.get("types", "").split() or fields.get("enabled", "yes").lower() in ("no", "false", "0"):
        return
    for uri in fields.get("uris", "").split():
        yield _entry(uri, fields.get("suites", "").split(), fields.get("components", "").split(), fields)


def _entry(uri: str, suites: list[str], components: list[str], options: dict[str, str]) -> Entry:
    loose = ("trusted", "allow-insecure", "allow-weak")
    return Entry(
        uri=uri,
        suites=tuple(suites),
        components=tuple(components),
        signed_by=options.get("signed-by", ""),
        options=tuple((name, options[name]) for name in _KEPT if name in options),
        trusted=any(options.get(name, "no").lower() in ("yes", "true", "1") for name in loose),
    )


def _is_debian(entry: Entry) -> bool:
    """Whether ``entry`` is of the Debian archive itself rather than of somebody who builds for Debian."""
    if entry.signed_by:
        signer = "debian-archive" in entry.signed_by
    else:
        signer = re.search(r"/debian(-security)?/?$", entry.uri) is not None
    return signer and "main" in entry.components and all(_SUITE.fullmatch(suite) for suite in entry.suites)


def _base(suite: str) -> str:
    match = _SUITE.fullmatch(suite)
    return match[1] if match else suite


def _of(entry: Entry, release: str) -> bool:
    return any(_base(suite) == release for suite in entry.suites)


def _release(entries: list[Entry], root: Path) -> str:
    """The release the host runs, if ``entries`` have it; else the first that they name in full."""
    named = [suite for entry in entries for suite in entry.suites if _base(suite) == suite]
    if not named:
        raise HostError("apt's Debian sources name no release, only updates of one", f"name a file in {VARIABLE}")
    try:
        text = (root / "etc/os-release").read_text(errors="replace")
    except OSError:
        text = ""
    match = re.search(r'^VERSION_CODENAME="?([a-z]+)"?$', text, re.MULTILINE)
    return match[1] if match and match[1] in named else named[0]


def _format(entry: Entry, release: str) -> str:
    signers = [line for line in entry.signed_by.split("\n") if line] or [KEYRING]
    lines = [
        "Types: deb",
        f"URIs: {entry.uri}",
        f"Suites: {' '.join(suite for suite in entry.suites if _base(suite) == release)}",
        f"Components: {' '.join(entry.components)}",
        # A path, or a whole key in lines of its own.
        f"Signed-By: {signers[0]}" if len(signers) == 1 else "\n ".join(["Signed-By:", *signers]),
        *(f"{name.title()}: {value}" for name, value in entry.options),
    ]
    return "\n".join(lines) + "\n"
