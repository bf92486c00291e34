"""Whether a package's maintainer scripts matter: whether leaving them out would leave the package half-working.

A script is read, not run. What is known to do nothing on a first installation into an image (no services run there, no
service manager, no menus) is taken away; if anything is left, the script matters.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from hva_images.debs import Deb

#: debhelper's tools whose additions do nothing here, or what the builder does itself (the linker's cache is not needed
#: for the directories that the linker knows; Python modules are compiled with the image).
_HARMLESS_TOOLS = frozenset(
    [
        "dh_icons",
        "dh_installinfo",
        "dh_installinit",
        "dh_installman",
        "dh_installmenu",
        "dh_installmime",
        "dh_installsystemd",
        "dh_installsystemduser",
        "dh_makeshlibs",
        "dh_python3",
        "dh_systemd_enable",
        "dh_systemd_start",
    ]
)
_BLOCK = re.compile(
    r"^# Automatically added by (?P<tool>\S+?)(?:/\S+)?\n(?P<text>.*?)^# End automatically added section\n?",
    re.MULTILINE | re.DOTALL,
)
#: Commands that do nothing on a first installation, and the frame that scripts put around nothing.
_HARMLESS_LINES = [
    re.compile(pattern)
    for pattern in (
        r"set -[eux]+",
        r"exit 0|true|:|esac|;;",
        r"dpkg-maintscript-helper\s+(rm_conffile|mv_conffile|symlink_to_dir|dir_to_symlink)\b.*",
        r"""case "?\$\{?1\}?"? in""",
        r"""[("']?[a-z*|\s-]+["']?\)( *(:|true|exit 0)? *;;)?""",
        r"""echo ["'`].*(unknown|called with).*""",
        r"exit 1",
        r"\. /usr/share/debconf/confmodule",
        r"db_stop( \|\| true)?",
        r"ldconfig",
    )
]


def why_scripts_matter(deb: Deb, interests: Iterable[str] = ()) -> str:
    """Why ``deb`` must be configured by dpkg in the guest; "" where it need not.

    :param interests: paths of which packages in the image want to be told when a file appears below.
    """
    for name in ("preinst", "postinst"):
        script = deb.script(name)
        if line := _what_is_left(script):
            return f"its {name} has: {line}"
    watched = tuple(f"{path}/" for path in ("/etc/ld.so.conf.d", *interests))
    for member in deb.members:
        if member.path.startswith(watched) and not member.is_dir:
            return f"it has {member.path}, which others act on"
    return ""


def file_interests(deb: Deb) -> list[str]:
    """Paths whose changes ``deb`` wants to be told of by file triggers (deb-triggers(5))."""
    return [name for name, _ in interests(deb) if name.startswith("/")]


def interests(deb: Deb) -> list[tuple[str, bool]]:
    """Triggers that ``deb`` is interested in, and whether those who activate them await it."""
    found: list[tuple[str, bool]] = []
    for line in deb.script("triggers").splitlines():
        words = line.split("#")[0].split()
        if len(words) == 2 and words[0].startswith("interest"):
            found.append((words[1], words[0] != "interest-noawait"))
    return found


def _what_is_left(script: str) -> str:
    """The first line of ``script`` that may do something; a script in another language is that as a whole."""
    if not script:
        return ""
    first = script.splitlines()[0] if script else ""
    if not re.match(r"#! ?/(usr/)?bin/(env )?(ba|da)?sh\b", first):
        return first[:80] or "no interpreter"
    text = _BLOCK.sub(_keep_or_drop, script).replace("\\\n", " ")
    for raw in text.splitlines():
        line = raw.strip()
        if not line or line.startswith("#"):
            continue
        if not any(pattern.fullmatch(line) for pattern in _HARMLESS_LINES):
            return line[:80]
    return ""


def _keep_or_drop(match: re.Match[str]) -> str:
    return "" if match["tool"] in _HARMLESS_TOOLS else match["text"]
