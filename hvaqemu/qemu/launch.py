"""From files to a QEMU whose monitor answers, or an error and nothing left behind."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from hvaqemu.config import VmConfig
from hvaqemu.errors import DeadlineExceeded, PeerLost
from hvaqemu.qemu import sockets
from hvaqemu.qemu.command import LaunchFiles, LaunchSockets, build_command
from hvaqemu.qemu.events import QmpEvent
from hvaqemu.qemu.process import QemuLaunchError, QemuProcess
from hvaqemu.qemu.qmp import QmpLink

#: Files of a running VM, in its runtime directory.
QMP_SOCKET = "qmp.sock"
AGENT_SOCKET = "agent.sock"
QEMU_LOG = "qemu.log"
CONSOLE_LOG = "console.log"


async def launch(
    config: VmConfig,
    files: LaunchFiles,
    *,
    runtime: Path,
    shim: Path,
    on_event: Callable[[QmpEvent], None],
    store: int | None = None,
    tap: int | None = None,
    die_with_parent: bool = False,
    timeout: float = 30.0,
) -> tuple[QemuProcess, QmpLink]:
    """Start QEMU and connect to its monitor. The guest does not run yet: ``cont`` does that.

    :param runtime: the VM's own directory, which must exist; gets the sockets and QEMU's log.
    :param store: descriptor of a file for the compressed store; None: it is in memory.
    :param tap: the descriptor of the VM's tap device, if it has one; the caller's to close.
    :param timeout: seconds until the monitor must answer.
    :raise QemuLaunchError: QEMU ended; carries its command line, exit status and words.
    :raise DeadlineExceeded: the monitor did not answer in time.
    :raise HostError: no QEMU, no room, or a VM that uses ``runtime`` already.
    """
    with ExitStack() as undo:
        with ExitStack() as ours:
            descriptors = []
            for name in (QMP_SOCKET, AGENT_SOCKET):
                listener = ours.enter_context(sockets.listen(runtime / name))
                undo.callback((runtime / name).unlink, missing_ok=True)
                descriptors.append(listener.fileno())
            argv = build_command(config.profile, config, files, LaunchSockets(descriptors[0], descriptors[1], tap))
            process = QemuProcess.spawn(
                argv,
                pass_fds=[*descriptors, *([] if tap is None else [tap])],
                shim=shim,
                log=runtime / QEMU_LOG,
                store=store,
                die_with_parent=die_with_parent,
            )
        link = QmpLink(process, runtime / QMP_SOCKET, on_event)
        try:
            await link.connect(timeout)
        except BaseException as error:
            # Shielded: a cancelled launch must not leave a QEMU behind either.
            await asyncio.shield(_end(process, link))
            if isinstance(error, PeerLost):
                raise QemuLaunchError(argv, process.exited.result()) from error
            raise
        undo.pop_all()
    return process, link


async def _end(process: QemuProcess, link: QmpLink) -> None:
    await link.close()
    process.send_signal(signal.SIGKILL)
    try:
        await process.wait(10.0)
    except DeadlineExceeded:
        pass
    finally:
        process.close()
