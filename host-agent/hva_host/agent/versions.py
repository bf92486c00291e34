"""The versions of what takes part in a VM's life."""

from __future__ import annotations

import platform

import hvaqemu
from hvaqemu.qemu.qmp import QmpLink


def ours() -> dict[str, str]:
    """Of this process and its host."""
    return {"hvaqemu": hvaqemu.__version__, "Python": platform.python_version(), "host kernel": platform.release()}


async def of_qemu(qmp: QmpLink) -> str:
    """What a QEMU says it is; "7.2.19 (Debian 1:7.2+dfsg-7)".

    :raise HvaError: it does not answer.
    """
    answer = await qmp.execute("query-version")
    if not isinstance(answer, dict) or not isinstance(found := answer.get("qemu"), dict):
        return "unknown"
    number = ".".join(str(found.get(part)) for part in ("major", "minor", "micro"))
    package = str(answer.get("package") or "")
    return f"{number} ({package})" if package else number
