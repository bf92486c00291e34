"""A real QEMU: launched, asked, killed, stopped, adopted. Most of it with a guest that is not yet running."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pytest

from hva_host.shim import ensure_shim
from hva_images import GuestImage, ensure_image
from hvaqemu.config import VmConfig
from hvaqemu.errors import DeadlineExceeded, HostError, PeerLost
from hvaqemu.image_config import DEFAULT_IMAGE
from hvaqemu.qemu import sockets
from hvaqemu.qemu.command import LaunchFiles
from hvaqemu.qemu.disk import create_overlay
from hvaqemu.qemu.events import BalloonChange, GuestPanicked, Powerdown, QmpEvent, Resume, Shutdown, Stop
from hvaqemu.qemu.launch import AGENT_SOCKET, CONSOLE_LOG, QEMU_LOG, QMP_SOCKET, launch
from hvaqemu.qemu.process import QemuLaunchError, QemuProcess, StopHow, StopTimeouts
from hvaqemu.qemu.qmp import QmpError, QmpLink
from hvaqemu.units import MiB, TiB
from tests.vm.harness import BOOT_SECONDS, STEP_SECONDS

pytestmark = pytest.mark.timeout(600)

E = TypeVar("E", bound=QmpEvent)


@pytest.fixture(scope="module")
def image() -> GuestImage:
    return ensure_image(DEFAULT_IMAGE, base_dir=Path.cwd(), progress=print)


@pytest.fixture(scope="module")
def shim() -> Path:
    return ensure_shim()


@pytest.fixture
def runtime() -> Iterator[Path]:
    """A directory with a name that would break a comma list, and too long for a socket's address."""
    with tempfile.TemporaryDirectory(prefix="hva, test=") as folder:
        path = Path(folder) / ("d" * 100)
        path.mkdir(mode=0o700)
        yield path


class Events:
    """All events so far, and a way to wait for one of a kind."""

    def __init__(self) -> None:
        self.seen: list[QmpEvent] = []
        self._news = asyncio.Event()

    def put(self, event: QmpEvent) -> None:
        self.seen.append(event)
        self._news.set()

    async def until(self, kind: type[E]) -> E:
        while True:
            self._news.clear()
            for event in self.seen:
                if isinstance(event, kind):
                    return event
            await self._news.wait()


@dataclass
class Started:
    process: QemuProcess
    qmp: QmpLink
    events: Events
    runtime: Path


@asynccontextmanager
async def started(
    image: GuestImage, shim: Path, runtime: Path, *, memory: int = 256 * MiB, kernel_args: str = "", timeout: float = 30
) -> AsyncIterator[Started]:
    """A QEMU whose guest does not run yet; killed at the end, however that comes."""
    # A file of ours has a name of ours, which is its node's too; its folder may be called anything.
    overlay = runtime / "over,lay" / "root.qcow2"
    overlay.parent.mkdir(exist_ok=True)
    create_overlay(image.root, overlay)
    files = LaunchFiles(
        kernel=image.kernel,
        initrd=image.initrd,
        kernel_args=f"{image.kernel_args} {kernel_args}".strip(),
        golden=image.root,
        overlay=overlay,
        console_log=runtime / CONSOLE_LOG,
    )
    events = Events()
    config = VmConfig(name="test", memory=memory, cpus=2)
    process, qmp = await launch(
        config, files, runtime=runtime, shim=shim, on_event=events.put, die_with_parent=True, timeout=timeout
    )
    try:
        yield Started(process, qmp, events, runtime)
    finally:
        await qmp.close()
        process.send_signal(signal.SIGKILL)
        await process.wait(STEP_SECONDS)
        process.close()


async def first_bytes_of_the_agent(vm: Started) -> bytes:
    """What the guest agent says first, once it runs."""
    with sockets.address_of(vm.runtime / AGENT_SOCKET) as address:
        reader, writer = await asyncio.open_unix_connection(address)
    try:
        return await vm.process.race(reader.read(4), BOOT_SECONDS, "guest agent")
    finally:
        writer.close()


async def test_launch_run_balloon_and_soft_stop(image: GuestImage, shim: Path, runtime: Path) -> None:
    async with started(image, shim, runtime) as vm:
        assert (await vm.qmp.status()).status == "prelaunch"
        await vm.qmp.cont()
        assert (await vm.qmp.status()).running
        assert await first_bytes_of_the_agent(vm)
        assert await vm.qmp.balloon(192 * MiB, 30) == 192 * MiB
        report = await vm.process.stop(vm.qmp, StopTimeouts(powerdown=60))
        assert (report.how, report.exit.status, report.complaints) == (StopHow.POWERDOWN, 0, ())
        kinds = [type(event) for event in vm.events.seen]
        assert {Resume, BalloonChange, Powerdown} <= set(kinds)
        assert (await asyncio.wait_for(vm.events.until(Shutdown), STEP_SECONDS)).guest
        assert (runtime / CONSOLE_LOG).stat().st_size > 0
        assert (await vm.process.stop(vm.qmp)).how is StopHow.GONE


async def test_guest_panic_is_an_event_and_the_machine_stays(image: GuestImage, shim: Path, runtime: Path) -> None:
    async with started(image, shim, runtime, kernel_args="rdinit=/none init=/none root=/dev/none") as vm:
        await vm.qmp.cont()
        await vm.process.race(vm.events.until(GuestPanicked), BOOT_SECONDS, "panic")
        # Told before it is done.
        await vm.process.race(vm.events.until(Stop), STEP_SECONDS, "the machine's stop")
        assert (await vm.qmp.status()).status == "guest-panicked"
        report = await vm.process.stop(vm.qmp, StopTimeouts(quit=60))
        assert report.how is StopHow.QUIT
        assert report.complaints == ("system_powerdown: the guest does not run (guest-panicked)",)


async def test_what_the_pager_and_the_host_agent_look_for(image: GuestImage, shim: Path, runtime: Path) -> None:
    async with started(image, shim, runtime) as vm:
        links = [os.readlink(entry) for entry in Path(f"/proc/{vm.process.pid}/fd").iterdir()]  # noqa: PTH115
        assert links.count("anon_inode:[userfaultfd]") == 1
        assert links.count("/memfd:memory-backend-memfd (deleted)") == 1
        assert links.count("/memfd:hva-ledger (deleted)") == 1
        for name in (QMP_SOCKET, AGENT_SOCKET, QEMU_LOG):
            assert (runtime / name).stat().st_mode & 0o077 == 0
        assert await vm.qmp.memory_devices() == []
        assert (await vm.qmp.migration()).status is None
        nodes = {node.node_name: node for node in await vm.qmp.block_nodes()}
        assert nodes["root"].backing_file == str(image.root)
        assert nodes["golden"].read_only
        assert not any(node.cache.direct for node in nodes.values())
        assert os.getsid(vm.process.pid) == vm.process.pid


async def test_killed_while_asked(image: GuestImage, shim: Path, runtime: Path) -> None:
    async with started(image, shim, runtime) as vm:
        # A stopped QEMU answers nothing, so the question is surely open when it dies.
        vm.process.send_signal(signal.SIGSTOP)
        asked = asyncio.create_task(vm.qmp.execute("query-status", timeout=60))
        await asyncio.sleep(0.1)
        began = time.monotonic()
        vm.process.send_signal(signal.SIGKILL)
        with pytest.raises(PeerLost, match="query-status"):
            await asked
        assert time.monotonic() - began < 5
        info = await vm.process.wait(STEP_SECONDS)
        assert (info.signal, info.status, info.how) == (signal.SIGKILL, None, "was killed by SIGKILL")
        assert await asyncio.wait_for(vm.qmp.lost(), STEP_SECONDS)
        assert not vm.qmp.connected
        with pytest.raises(PeerLost):
            await vm.qmp.status()
        with pytest.raises(PeerLost):
            await vm.qmp.connect(5)


async def test_silent_qemu_is_stopped_hard_and_loud(image: GuestImage, shim: Path, runtime: Path) -> None:
    async with started(image, shim, runtime) as vm:
        vm.process.send_signal(signal.SIGSTOP)
        with pytest.raises(DeadlineExceeded, match="QMP query-status: no answer within"):
            await vm.qmp.execute("query-status", timeout=0.1)
        report = await vm.process.stop(vm.qmp, StopTimeouts(powerdown=0.3, quit=0.3, terminate=0.3))
        assert report.how is StopHow.KILLED
        assert [text.split(":")[0] for text in report.complaints] == ["QMP query-status", "QMP quit", "SIGTERM"]
        assert report.seconds < 10


async def test_stop_without_a_monitor(image: GuestImage, shim: Path, runtime: Path) -> None:
    async with started(image, shim, runtime) as vm:
        assert (await vm.process.stop(None, StopTimeouts(terminate=60))).how is StopHow.TERMINATED


async def test_refused_command_and_reconnection(image: GuestImage, shim: Path, runtime: Path) -> None:
    async with started(image, shim, runtime) as vm:
        with pytest.raises(QmpError, match="QMP device_del: Device 'nothing' not found") as caught:
            await vm.qmp.execute("device_del", {"id": "nothing"})
        assert caught.value.error_class == "DeviceNotFound"
        other = QmpLink(vm.process, runtime / QMP_SOCKET)
        with pytest.raises(DeadlineExceeded, match="QMP connection"):
            await other.connect(0.3)
        await vm.qmp.close()
        assert not vm.qmp.connected
        await other.connect(5)
        assert (await other.status()).status == "prelaunch"
        await other.close()
        await vm.qmp.connect(5)
        assert (await vm.qmp.status()).status == "prelaunch"


async def test_handler_that_fails_does_not_cut_the_link(image: GuestImage, shim: Path, runtime: Path) -> None:
    async with started(image, shim, runtime) as vm:
        await vm.qmp.close()

        def fail(event: QmpEvent) -> None:
            vm.events.put(event)
            raise RuntimeError(str(event))

        link = QmpLink(vm.process, runtime / QMP_SOCKET, fail)
        await link.connect(5)
        await link.cont()
        await link.pause()
        assert len(vm.events.seen) >= 2
        assert link.connected
        await link.close()


async def test_memory_qemu_refuses(image: GuestImage, shim: Path, runtime: Path) -> None:
    with pytest.raises(QemuLaunchError, match=r"exited with status 1: .*Cannot allocate memory") as caught:
        async with started(image, shim, runtime, memory=100 * TiB):
            pass
    assert caught.value.argv[0] == "qemu-system-s390x"
    assert caught.value.exit.status == 1
    assert "\n" not in str(caught.value)
    assert {entry.name for entry in runtime.iterdir()} <= {"over,lay", QEMU_LOG, CONSOLE_LOG}


@pytest.fixture
def broken_shim(tmp_path: Path) -> Path:
    """A shim that always fails, with words that would colour a terminal."""
    source, library = tmp_path / "broken.c", tmp_path / "broken.so"
    source.write_text(
        "#include <unistd.h>\n"
        'static const char said[] = "hvaqemu shim: \\033[31mno\\n";\n'
        "__attribute__((constructor)) static void no(void)\n"
        "{ (void)!write(2, said, sizeof said - 1); _exit(1); }\n"
    )
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", str(library), str(source)], check=True, timeout=60)
    return library


async def test_failing_shim_ends_the_launch(image: GuestImage, broken_shim: Path, runtime: Path) -> None:
    with pytest.raises(QemuLaunchError) as caught:
        async with started(image, broken_shim, runtime):
            pass
    assert str(caught.value) == "qemu-system-s390x exited with status 1: hvaqemu shim: \\x1b[31mno"


async def test_monitor_that_never_answers_leaves_nothing(image: GuestImage, shim: Path, runtime: Path) -> None:
    began = time.monotonic()
    with pytest.raises(DeadlineExceeded, match="QMP connection"):
        async with started(image, shim, runtime, timeout=0.0):
            pass
    assert time.monotonic() - began < 15
    assert {entry.name for entry in runtime.iterdir()} <= {"over,lay", QEMU_LOG, CONSOLE_LOG}
    assert not living(runtime)


def living(runtime: Path) -> list[int]:
    """QEMUs that were started below ``runtime``."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                argv = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if argv.startswith(b"qemu-system") and os.fsencode(runtime.parent) in argv.replace(b",,", b","):
                found.append(int(entry.name))
    return found


async def test_adopted(image: GuestImage, shim: Path, runtime: Path) -> None:
    async with started(image, shim, runtime) as vm:
        await vm.qmp.close()
        with pytest.raises(PeerLost, match="another process has its number"):
            QemuProcess.adopt(vm.process.pid, vm.process.start_time + 1, vm.process.log)
        adopted = QemuProcess.adopt(vm.process.pid, vm.process.start_time, vm.process.log)
        link = QmpLink(adopted, runtime / QMP_SOCKET)
        await link.connect(5)
        report = await adopted.stop(link, StopTimeouts(powerdown=0, quit=60))
        assert (report.how, report.exit.how) == (StopHow.QUIT, "is gone")
        await link.close()
        adopted.close()
        await vm.process.wait(STEP_SECONDS)
        with pytest.raises(PeerLost, match="is gone"):
            QemuProcess.adopt(vm.process.pid, vm.process.start_time, vm.process.log)


async def test_close_lets_go_without_ending(image: GuestImage, shim: Path, runtime: Path) -> None:
    async with started(image, shim, runtime) as vm:
        adopted = QemuProcess.adopt(vm.process.pid, vm.process.start_time, vm.process.log)
        waiting = asyncio.create_task(adopted.wait(STEP_SECONDS))
        await asyncio.sleep(0)
        adopted.close()
        await waiting
        assert (await vm.qmp.status()).status == "prelaunch"


def test_dies_with_the_process_that_started_it(image: GuestImage, shim: Path, runtime: Path) -> None:
    code = f"""
import asyncio, sys, time
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
from hvaqemu.qemu.process import QemuProcess
async def main():
    qemu = QemuProcess.spawn(
        ["qemu-system-s390x", "-machine", "none", "-nodefaults", "-display", "none", "-S"],
        pass_fds=[], shim=Path({str(shim)!r}), log=Path({str(runtime / QEMU_LOG)!r}), die_with_parent=True,
    )
    print(qemu.pid, flush=True)
    await qemu.wait(60)
asyncio.run(main())
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        pidfd = os.pidfd_open(pid)
        parent.kill()
    deadline = time.monotonic() + 10
    try:
        # It may end while it is looked at.
        with suppress(OSError):
            while b"qemu" in Path(f"/proc/{pid}/cmdline").read_bytes():
                assert time.monotonic() < deadline, "QEMU outlived its parent"
                time.sleep(0.02)
    finally:
        os.close(pidfd)


async def test_no_such_program(shim: Path, tmp_path: Path) -> None:
    with pytest.raises(HostError, match="install the package qemu-system-misc"):
        QemuProcess.spawn(["qemu-system-nothing"], pass_fds=[], shim=shim, log=tmp_path / "log")
