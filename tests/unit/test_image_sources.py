"""Which of a host's apt sources images are built from."""

from __future__ import annotations

from pathlib import Path

import pytest

from hva_images.sources import KEYRING, VARIABLE, Sources, load_sources
from hvaqemu.errors import ConfigError, HostError

_DEB822 = f"""\
Types: deb deb-src
# a comment
URIs: http://archive.example/debian
Suites: bookworm bookworm-updates
Components: main
Signed-By: {KEYRING}

Types: deb
URIs: http://archive.example/debian-security/
Suites: bookworm-security
Components: main contrib
Architectures: amd64
Trusted: yes
Check-Valid-Until: no

Types: deb
URIs: http://archive.example/debian
Suites: trixie
Components: main
Enabled: no
"""
_THIRD_PARTY = """\
deb [signed-by=/usr/share/keyrings/vendor.gpg] https://vendor.example/linux/debian bookworm stable
deb [arch=amd64 signed-by=/etc/apt/keyrings/vendor.asc] https://vendor.example/debian bookworm main
deb https://vendor.example/repository bookworm main
deb http://archive.example/debian bookworm-pgdg main
"""


@pytest.fixture(autouse=True)
def _no_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)


def host(root: Path, codename: str = "bookworm", **files: str) -> Path:
    folder = root / "etc/apt/sources.list.d"
    folder.mkdir(parents=True)
    (root / "etc/os-release").write_text(f'ID=debian\nVERSION_CODENAME="{codename}"\n')
    for name, text in files.items():
        path = folder.parent / "sources.list" if name == "main" else folder / name.replace("_", ".")
        path.write_text(text)
    return root


def test_deb822_keeps_debian_and_checks_signatures(tmp_path: Path) -> None:
    sources = load_sources(host(tmp_path, debian_sources=_DEB822))
    assert sources == Sources(
        "bookworm",
        f"Types: deb\nURIs: http://archive.example/debian\nSuites: bookworm bookworm-updates\nComponents: main\n"
        f"Signed-By: {KEYRING}\n"
        "\n"
        "Types: deb\nURIs: http://archive.example/debian-security/\nSuites: bookworm-security\n"
        f"Components: main contrib\nSigned-By: {KEYRING}\nCheck-Valid-Until: no\n",
    )


def test_third_parties_are_left_out(tmp_path: Path) -> None:
    sources = load_sources(host(tmp_path, debian_sources=_DEB822, vendor_list=_THIRD_PARTY))
    assert "vendor" not in sources.text
    assert "pgdg" not in sources.text


def test_one_line_format(tmp_path: Path) -> None:
    text = (
        "# deb http://archive.example/debian sid main\n"
        "deb [check-valid-until=no trusted=yes] http://archive.example/debian bookworm main contrib # mine\n"
        "deb-src http://archive.example/debian bookworm main\n"
    )
    sources = load_sources(host(tmp_path, main=text))
    assert sources.text == (
        "Types: deb\nURIs: http://archive.example/debian\nSuites: bookworm\nComponents: main contrib\n"
        f"Signed-By: {KEYRING}\nCheck-Valid-Until: no\n"
    )


def test_the_hosts_release_is_taken_among_several(tmp_path: Path) -> None:
    lines = "".join(
        f"deb http://archive.example/debian {suite} main\n" for suite in ("sid", "trixie", "trixie-updates")
    )
    sources = load_sources(host(tmp_path, "trixie", main=lines))
    assert sources.suite == "trixie"
    assert "sid" not in sources.text
    assert sources.text.count("URIs:") == 2


def test_a_host_without_debian_sources(tmp_path: Path) -> None:
    with pytest.raises(HostError, match=VARIABLE):
        load_sources(host(tmp_path, vendor_list=_THIRD_PARTY))


def test_a_chosen_file_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = tmp_path / "mirror.list"
    chosen.write_text("deb [signed-by=/own/key.gpg] http://mirror.example/d bookworm main\n")
    monkeypatch.setenv(VARIABLE, str(chosen))
    sources = load_sources(host(tmp_path / "host", debian_sources=_DEB822))
    assert "mirror.example" in sources.text
    assert "archive.example" not in sources.text
    assert "Signed-By: /own/key.gpg\n" in sources.text


def test_a_key_in_the_file_itself_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = tmp_path / "mirror.sources"
    head = "Types: deb\nURIs: http://mirror.example/d\nSuites: bookworm\nComponents: main\n"
    key = "Signed-By:\n -----BEGIN PGP PUBLIC KEY BLOCK-----\n .\n mDME\n -----END PGP PUBLIC KEY BLOCK-----\n"
    chosen.write_text(head + key)
    monkeypatch.setenv(VARIABLE, str(chosen))
    assert load_sources(host(tmp_path / "host")).text == head + key


@pytest.mark.parametrize("option", ["trusted=yes", "allow-insecure=yes", "allow-weak=true"])
def test_a_chosen_file_may_not_switch_signatures_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    chosen = tmp_path / "mirror.list"
    chosen.write_text(f"deb [{option}] http://mirror.example/d bookworm main\n")
    monkeypatch.setenv(VARIABLE, str(chosen))
    with pytest.raises(ConfigError, match="signatures"):
        load_sources(host(tmp_path / "host"))


def test_a_chosen_file_that_is_missing_or_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = tmp_path / "mirror.list"
    monkeypatch.setenv(VARIABLE, str(chosen))
    with pytest.raises(ConfigError, match="No such file"):
        load_sources(tmp_path)
    chosen.write_text("# nothing\n")
    with pytest.raises(ConfigError, match="no apt sources"):
        load_sources(tmp_path)
