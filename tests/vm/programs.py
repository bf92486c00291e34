"""The programs in ``guest/``: how they come into a guest, all together, and how one of them is started there."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

_FOLDER = Path(__file__).parent / "guest"
#: Where they are in a guest once one of them was started.
_PLACE = "/run/guest.zip"
#: Before the name of a program and its arguments, in a shell of a guest that has them.
PYTHON = f"PYTHONPATH={_PLACE} python3 -B -m"
_RUN = f'cat >{_PLACE}.new && mv {_PLACE}.new {_PLACE} && {PYTHON.replace("python3", "exec python3")} "$@" </dev/null'


def bundle() -> bytes:
    """All of them, as a zip file that Python can import from."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as file:
        for path in sorted(_FOLDER.glob("*.py")):
            file.write(path, path.name)
    return content.getvalue()


def start_command(program: str, *arguments: object) -> list[str]:
    """The command that brings them into a guest and starts one; its standard input must be :func:`bundle`."""
    return ["sh", "-c", _RUN, "sh", program, *map(str, arguments)]
