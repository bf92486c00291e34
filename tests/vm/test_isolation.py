"""What belongs to one VM, or to one user, is nobody else's: files, sockets, descriptors, names, commands.

All of it was made with a umask that keeps nothing private.
"""

from __future__ import annotations

import asyncio
import json
import os
import stat
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import pytest_asyncio

from hva_host.agent.control import CONTROL_SOCKET
from hva_host.agent.guest_link import GuestLink
from hva_host.agent.pager_parent import PagerParent
from hva_host.agent.pager_process import PAGER_SOCKET, PagerHandle
from hvaqemu.errors import ConfigError, GuestError, HvaError, LaunchError, RefusedError
from hvaqemu.pages import PAGE_SHIFT
from hvaqemu.qemu.launch import AGENT_SOCKET, QMP_SOCKET
from hvaqemu.units import MiB
from tests.vm.betrayal import Golden
from tests.vm.harness import BOOT_SECONDS, STEP_SECONDS, until
from tests.vm.host import Host, own_host

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(600)]

_STRANGER = 64321
_MEMORY = 192 * MiB
_VM = "name: {name}\nmemory: 192M\nallow_exec: {allow}\nboot_timeout: 240s\n"
#: Connects to $1, writes $2, and says what comes back.
_KNOCK = """
import socket, sys
with socket.socket(socket.AF_UNIX) as knocker:
    knocker.settimeout(20)
    try:
        knocker.connect(sys.argv[1])
        knocker.sendall(sys.argv[2].encode())
        print(len(knocker.recv(65536)))
    except OSError as error:
        print(type(error).__name__)
"""
_HELLO = '{"id": 1, "execute": "hello", "arguments": {}}\n'
#: Escape sequences in ASCII and in C1, a bidirectional override, a character nobody sees, markup.
_EVIL = r"\033[2J\302\2332J\342\200\256\177\033]0;owned\007[red]text[/red]"
_RAW = ("\x1b", "\x9b", "\u202e", "\x7f", "\x07")


class Two:
    """Two VMs of one host agent."""

    def __init__(self, host: Host, golden: Golden) -> None:
        self.host = host
        self.golden = golden
        self.qemus = {name: self._process(name, "qemu.log", 1) for name in ("left", "right")}

    def folder(self, name: str) -> Path:
        return self.host.runtime / "vms" / name

    def _process(self, name: str, log: str, descriptor: int) -> int:
        for pid in self.host.processes():
            with suppress(OSError):
                if Path(f"/proc/{pid}/fd/{descriptor}").readlink() == self.folder(name) / log:
                    return pid
        raise AssertionError(f"no process of {name} writes {log}")

    def pager(self, name: str) -> int:
        return self._process(name, "pager.log", 1)


@pytest.fixture(scope="module")
def open_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def two(open_umask: None, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Two]:
    golden = Golden(tmp_path_factory.mktemp("golden"))
    with own_host() as host:
        host.environment["HVAQEMU_CACHE_DIR"] = str(golden.cache)
        for name, allow in (("left", "true"), ("right", "false")):
            file = host.folder / f"{name}.yaml"
            file.write_text(_VM.format(name=name, allow=allow))
            await host.command("up", file)
        yield Two(host, golden)
        for name in ("left", "right"):
            await host.command("down", name)
        await host.all_gone()


def open_to_others(path: Path) -> list[str]:
    """What below a folder, and of it, others than its owner may do anything with."""
    found = []
    for each in (path, *path.rglob("*")):
        with suppress(FileNotFoundError):
            mode = each.lstat().st_mode
            if not stat.S_ISLNK(mode) and mode & 0o077:
                found.append(f"{each}: {stat.filemode(mode)}")
    return found


async def test_files_are_their_owners_alone(two: Two) -> None:
    await two.host.command("exec", "left", "--", "dmesg")
    await two.host.command("reclaim", "left")
    for place, names in (
        (two.host.runtime, {"agent.log", CONTROL_SOCKET, "agent.lock", "vm.json", "console.log", "qemu.log"}),
        (two.host.runtime, {"pager.log", PAGER_SOCKET, AGENT_SOCKET, QMP_SOCKET, "left", "right", "vms", "locks"}),
        (two.host.state, {"vms", "left", "right", "root.qcow2"}),
        (two.golden.cache, {"index", "images", "native"}),
    ):
        assert names <= {path.name for path in place.rglob("*")}
    assert open_to_others(two.host.runtime) == []
    assert open_to_others(two.host.state) == []
    # Images are read-only for everybody who gets through their folders, which is nobody.
    images = two.golden.cache / "images"
    wrong = [line for line in open_to_others(two.golden.cache) if not line.startswith(f"{images}/")]
    assert wrong == []
    assert all(path.stat().st_mode & 0o077 == 0 for path in (images, *images.iterdir()))


@pytest.mark.parametrize("umask", [0o000, 0o077])
async def test_reports_are_private_and_hold_no_raw_text_of_guests(two: Two, umask: int) -> None:
    folder = two.host.folder / f"u{umask:o}"
    folder.mkdir()
    scenario = folder / "s.yaml"
    printing = {"guest": f"printf '{_EVIL}' | tee /dev/console", "save": "said"}
    failing = {"guest": f"printf '{_EVIL}' >&2; exit 3"}
    vm = {"name": "third", "memory": "192M", "allow_exec": True, "boot_timeout": "240s"}
    scenario.write_text(json.dumps({"vm": vm, "steps": [printing, {"measure": "booted"}, failing]}))
    outputs = ["--json", str(folder / "result.json"), "--report", str(folder / "a/report")]
    done = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-m", "hva_host.cli.main", "run", str(scenario), *outputs],
        capture_output=True,
        env={**os.environ, **two.host.environment},
        timeout=300,
        umask=umask,
    )
    assert done.returncode == 1, done.stderr
    files = [folder / "result.json", *sorted((folder / "a/report").iterdir())]
    assert [file.name for file in files] == ["result.json", "report.html", "report.json", "report.txt", "timeline.png"]
    assert open_to_others(folder / "a") == []
    assert files[0].stat().st_mode & 0o777 == 0o600
    shown = [done.stdout.decode(), done.stderr.decode(), *(file.read_text() for file in files[:4])]
    assert "owned" in files[0].read_text()
    assert "owned" in shown[0]
    for text in shown:
        assert [raw for raw in _RAW if raw in text] == []


@contextmanager
def passable(*paths: Path) -> Iterator[None]:
    """Let everybody through folders and into sockets, as somebody may have done by mistake."""
    modes = {path: path.stat().st_mode & 0o7777 for path in paths}
    for path in paths:
        path.chmod(0o777)
    try:
        yield
    finally:
        for path, mode in modes.items():
            path.chmod(mode)


async def knock(path: Path, words: str, user: int | None) -> str:
    """What a process of a user finds at a socket: bytes it got, or its error."""
    become = ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups"] if user is not None else []
    process = await asyncio.create_subprocess_exec(
        *become, "/usr/bin/python3", "-I", "-c", _KNOCK, str(path), words, stdout=subprocess.PIPE
    )
    return (await process.communicate())[0].decode().strip()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
async def test_other_users_are_refused(two: Two) -> None:
    control, folder = two.host.runtime / CONTROL_SOCKET, two.folder("left")
    pager = folder / PAGER_SOCKET
    sockets = (control, pager, folder / AGENT_SOCKET, folder / QMP_SOCKET)
    way = (two.host.folder, two.host.runtime, two.host.runtime / "vms", folder)
    for socket in sockets:
        assert await knock(socket, "", _STRANGER) == "PermissionError"
    with passable(*way):
        # The folders let him through now; the sockets do not.
        for socket in sockets:
            assert await knock(socket, "", _STRANGER) == "PermissionError"
        with passable(control, pager):
            # Neither greets him nor answers: it hangs up.
            assert await knock(control, "", _STRANGER) in ("0", "ConnectionResetError", "BrokenPipeError")
            assert await knock(pager, _HELLO, _STRANGER) in ("0", "ConnectionResetError", "BrokenPipeError")
            assert int(await knock(control, "", None)) > 50
            assert int(await knock(pager, _HELLO, None)) > 20
    assert f"refused user {_STRANGER} on the control socket" in (two.host.runtime / "agent.log").read_text()
    assert open_to_others(two.host.runtime) == []


async def test_names_lead_nowhere_else(two: Two) -> None:
    names = ("../left", "left/../right", "..", ".", "", "/etc", "left/", "left\0", "\x1b[2J", "x" * 300, "-left")
    before = sorted(two.host.folder.rglob("*"))
    async with two.host.client() as client:
        for command in ("vm-status", "vm-down", "vm-console", "vm-restore", "vm-resume", "vm-measure", "vm-reclaim"):
            for name in names:
                with pytest.raises(ConfigError, match="name"):
                    await client.execute(command, {"name": name})
        for name in names:
            with pytest.raises(ConfigError, match="name"):
                await client.execute("vm-up", {"config": {"name": name, "memory": _MEMORY}})
        assert [status.name for status in await client.vms()] == ["left", "right"]
    assert sorted(two.host.folder.rglob("*")) == before


def held(pid: int) -> dict[tuple[int, int], str]:
    """What a process has open that is somebody's own: files, memory and sockets by device and inode.

    Character devices and anonymous inodes (eventfds, pidfds) are one inode for all.
    """
    found = {}
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):
            status, link = entry.stat(), str(entry.readlink())
            if not link.startswith(("anon_inode:", "/dev/")):
                found[status.st_dev, status.st_ino] = link
    return found


async def kept(pid: int) -> dict[tuple[int, int], str]:
    """The same without what it has only for a moment: whose number somebody else may have the next."""
    before = held(pid)
    await asyncio.sleep(0.3)
    return dict(before.items() & held(pid).items())


async def test_no_process_of_one_vm_has_anything_of_the_other(two: Two) -> None:
    golden = two.golden.root.stat()
    groups = {name: [two.qemus[name], two.pager(name)] for name in two.qemus}
    own: dict[str, dict[tuple[int, int], str]] = {}
    for name, pids in groups.items():
        own[name] = {key: link for pid in pids for key, link in (await kept(pid)).items()}
        links = " ".join(own[name].values())
        for part in ("memory-backend-memfd", "hva-ledger", "hva-store", "root.qcow2", "console.log", "socket:"):
            assert part in links
        assert f"/vms/{name}/" in links
    shared = own["left"].keys() & own["right"].keys()
    assert {own["left"][key] for key in shared} <= {str(two.golden.root)}
    assert shared <= {(golden.st_dev, golden.st_ino)}
    # What pagers are forked from has nothing of either, nor has the host agent their memory.
    (parent,) = two.host.pager_parents()
    (agent,) = two.host.agents()
    private = {key for things in own.values() for key in things} - shared
    assert (await kept(parent)).keys() & private == set()
    links = " ".join((await kept(agent)).values())
    for part in ("memfd", "root.qcow2", "console.log"):
        assert part not in links


async def test_a_pager_does_not_take_another_vms_qemu(two: Two, tmp_path: Path) -> None:
    status = await two.host.pager_status("right")
    parent = PagerParent()
    second = PagerHandle(tmp_path, parent, lambda _name, _data: None)
    try:
        with pytest.raises(LaunchError, match="another pager serves this VM"):
            await second.start(two.qemus["right"], ())
    finally:
        await second.close()
        parent.close()
    assert (await two.host.pager_status("right"))["backing_bytes"] > 0
    assert status["held"] == []


async def test_exec_is_off_unless_the_vms_file_says_so(two: Two) -> None:
    """On both sides: the host agent does not ask, and a guest agent that is asked all the same does not do it."""
    done = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-m", "hva_host.cli.main", "exec", "right", "--", "true"],
        capture_output=True,
        text=True,
        env={**os.environ, **two.host.environment},
        timeout=60,
    )
    assert done.returncode == 1
    assert done.stderr == ("hvaqemu: VM right: commands in the guest are off (set allow_exec: true in its file)\n")
    # The port serves one; the host agent lets go of it.
    await two.host.command("agent", "--stop")
    await until(lambda: not two.host.agents(), STEP_SECONDS, "the end of the host agent")
    async with GuestLink(two.folder("right") / AGENT_SOCKET, pages=_MEMORY >> PAGE_SHIFT) as link:
        await link.wait_connected(BOOT_SECONDS)
        with pytest.raises((GuestError, RefusedError)):
            await link.execute(["touch", "/run/done"], 20.0)
    async with GuestLink(two.folder("left") / AGENT_SOCKET, pages=_MEMORY >> PAGE_SHIFT) as link:
        await link.wait_connected(BOOT_SECONDS)
        assert (await link.execute(["true"], 20.0)).ok
    with suppress(HvaError):
        await two.host.command("ls")
