"""What in a QEMU makes discarding unsafe, asked before every epoch: it may have been plugged in since the start."""

from __future__ import annotations

from hvaqemu.errors import HvaError, RefusedError
from hvaqemu.qemu.command import BALLOON_ID
from hvaqemu.qemu.qmp import QmpLink

_MIGRATING = frozenset(
    ("setup", "active", "postcopy-active", "postcopy-paused", "postcopy-recover", "pre-switchover", "device")
)
#: QOM types (by a part of their names) that map or pin guest RAM elsewhere, or punch it on their own.
_DEVICES = {
    "vhost-user": "vhost-user lets another process write guest RAM",
    "vhost-vsock": "kernel vhost writes guest RAM past QEMU",
    "vhost-scsi": "kernel vhost writes guest RAM past QEMU",
    "vhost-vdpa": "vDPA pins guest RAM",
    "vfio": "VFIO pins guest RAM",
    "virtio-mem": "virtio-mem plugs and unplugs guest RAM on its own",
}
_FOLDERS = ("/machine/peripheral", "/machine/peripheral-anon")


async def refuse(qmp: QmpLink) -> None:
    """See that nothing in QEMU makes discarding unsafe now.

    :raise RefusedError: something does; says what.
    :raise HvaError: QEMU went, or did not answer.
    """
    migration = await qmp.migration()
    if migration.status in _MIGRATING:
        raise RefusedError(f"a migration is under way ({migration.status})", "wait for its end")
    if await qmp.memory_devices():
        raise RefusedError("the VM has hot-plugged memory", "only the RAM it was started with is known")
    for node in await qmp.block_nodes():
        if node.cache.direct:
            raise RefusedError(f"disk {node.node_name} is open for direct I/O", "open it with cache.direct=off")
    for folder in _FOLDERS:
        for name, kind in await _children(qmp, folder):
            for part, reason in _DEVICES.items():
                if part in kind:
                    raise RefusedError(f"device {name} ({kind}): {reason}", "unplug it")
    try:
        path = f"{_FOLDERS[0]}/{BALLOON_ID}"
        reporting = await qmp.execute("qom-get", {"path": path, "property": "free-page-reporting"})
    except HvaError as error:
        if "not found" not in str(error):
            raise
        reporting = False
    if reporting:
        raise RefusedError("free page reporting is on", "it discards pages on its own; turn it off")


async def _children(qmp: QmpLink, folder: str) -> list[tuple[str, str]]:
    answer = await qmp.execute("qom-list", {"path": folder})
    entries = answer if isinstance(answer, list) else []
    found = [(str(entry.get("name")), str(entry.get("type"))) for entry in entries if isinstance(entry, dict)]
    return [(name, kind[6:-1]) for name, kind in found if kind.startswith("child<")]
