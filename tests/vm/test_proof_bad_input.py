"""What a user or a host can get wrong: one clear line on the terminal, exit code 1, nothing half-built left."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from hva_host.agent.records import VmFolder
from hva_images import ensure_image
from hvaqemu.image_config import DEFAULT_IMAGE
from hvaqemu.paths import cache_dir

pytestmark = pytest.mark.timeout(900)

_SECONDS = 600.0
_HVAQEMU = (sys.executable, "-m", "hva_host.cli.main")
#: In namespaces of its own a process is root and still may not open a userfaultfd, once the device is hidden.
_HIDE = '[ ! -e "$0" ] || mount --bind /dev/null "$0"; exec "$@"'
_NO_USERFAULTFD = ("unshare", "-rm", "sh", "-c", _HIDE, "/dev/userfaultfd")
_needs_mounts = pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts a small file system")


class Host:
    """A runtime and a state directory, files of a user, and the command line."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {
            **os.environ,
            "HVAQEMU_RUNTIME_DIR": str(folder / "r"),
            "HVAQEMU_STATE_DIR": str(folder / "s"),
            "HVAQEMU_CACHE_DIR": str(cache_dir()),
        }

    def file(self, name: str, content: str = "") -> Path:
        path = self.folder / name
        path.write_text(content)
        return path

    def scenario(self, more: str = "", memory: str = "128M") -> Path:
        """A scenario that would hold, but for ``more``, lines of its VM."""
        return self.file("s.yaml", f"vm:\n  name: bad\n  memory: {memory}\n{more}\nsteps:\n  - measure: booted\n")

    def fails(self, *words: str | Path, within: Sequence[str] = ()) -> str:
        """What a command that must fail says of it, in the one line it has for that."""
        done = subprocess.run(
            [*within, *_HVAQEMU, *words],
            capture_output=True,
            text=True,
            env=self.environment,
            cwd=self.folder,
            timeout=_SECONDS,
        )
        said = done.stderr
        assert done.returncode == 1, said
        # What goes on is told, too; of what went wrong there is one line, the last.
        lines = [line for line in said.splitlines() if line.startswith("hvaqemu: ")]
        assert said.splitlines()[-1:] == lines, said
        assert "Traceback" not in said
        return lines[0].removeprefix("hvaqemu: ")

    def left(self) -> list[Path]:
        """What there is of VMs."""
        return [path for place in "rs" for path in (self.folder / place / "vms").glob("*")]


@pytest.fixture
def host() -> Iterator[Host]:
    with tempfile.TemporaryDirectory(prefix="hva-bad-", dir="/tmp") as folder:
        made = Host(Path(folder))
        yield made
        assert made.left() == []


@pytest.fixture(scope="module", autouse=True)
def image() -> None:
    """The default image, so that no test waits for it to be built."""
    ensure_image(DEFAULT_IMAGE, base_dir=Path.cwd(), progress=print)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("vm:\n  name: a\n  memroy: 128M\n", r"s\.yaml:3: key vm\.memroy: is not a known key"),
        ("vm:\n  name: a\n  memory: lots\nsteps: []\n", r"s\.yaml:3: key vm\.memory: .*lots"),
        ("vm:\n  name: a\n  memory: 64M\n", r"s\.yaml:3: key vm\.memory: .*too little"),
        ("vm:\n  name: ../a\n  memory: 128M\n", r"s\.yaml:2: key vm\.name: "),
        ("vm:\n  name: a\n  name: b\n", r"s\.yaml:3: .*name"),
        ("vm: {name: a, memory: 128M}\nsteps:\n  - measure: a\n  - measur: b\n", r"s\.yaml:4: key steps\[1\]"),
        ("vm: [\n", r"s\.yaml:\d+: "),
        ("vm: \x1b[31m\n", r"s\.yaml:"),
    ],
)
def test_wrong_yaml(host: Host, content: str, said: str) -> None:
    line = host.fails("run", host.file("s.yaml", content))
    assert re.search(said, line)
    assert line.isprintable()


def test_a_store_where_it_can_not_be(host: Host) -> None:
    line = host.fails("run", host.scenario("  store: {folder: nowhere}"))
    assert line.startswith(f"VM bad: store.folder: {host.folder}/nowhere: there is no such folder")
    line = host.fails("run", host.scenario("  store: {folder: /dev/shm}"))
    assert "store.folder: /dev/shm: is in the host's memory" in line


def test_missing_file(host: Host) -> None:
    assert "nothing.yaml: No such file or directory" in host.fails("up", "nothing.yaml")


@pytest.mark.parametrize(
    ("image", "said"), [("nothing", "nothing: no such image"), ("./no.yaml", "no.yaml: No such file or directory")]
)
def test_missing_image(host: Host, image: str, said: str) -> None:
    assert said in host.fails("run", host.scenario(f"  image: {image}"))


@pytest.mark.parametrize(
    ("disk", "said"),
    [
        ("missing", "No such file or directory"),
        ("empty", "0 bytes, but a disk has a multiple of 512"),
        ("odd", "1000 bytes, but a disk has a multiple of 512"),
        ("folder", "is not a file or block device"),
        ("pipe", "is not a file or block device"),
        ("loop", "Too many levels of symbolic links"),
    ],
)
def test_disk_that_is_none(host: Host, disk: str, said: str) -> None:
    host.file("empty")
    host.file("odd", "x" * 1000)
    (host.folder / "folder").mkdir()
    os.mkfifo(host.folder / "pipe")
    (host.folder / "loop").symlink_to("loop")
    line = host.fails("run", host.scenario(f"  extra_disks: [{{path: {disk}}}]"))
    assert line.startswith(f"extra_disks[0]: {host.folder / disk}: ")
    assert said in line


def test_image_too_small_for_its_files(host: Host) -> None:
    images = set((cache_dir() / "images").iterdir())
    small = host.file("small.yaml", "name: small\nbase: debian-s390x\nsize: 64M\n")
    line = host.fails("image", "build", small)
    assert re.search(r"image small: size: 64\.0 MiB is too small, .* \(write at least \d+M\)", line)
    assert set((cache_dir() / "images").iterdir()) <= images


def test_memory_that_qemu_refuses(host: Host) -> None:
    line = host.fails("run", host.scenario(memory="100T"))
    assert line.startswith("qemu-system-s390x exited with status 1: ")
    assert "Cannot allocate memory" in line


def test_accelerator_that_is_none(host: Host) -> None:
    assert "kvm" in host.fails("run", host.scenario("  accelerator: kvm"))


def test_no_permission_for_userfaultfd(host: Host) -> None:
    if subprocess.run([*_NO_USERFAULTFD, "true"], capture_output=True, timeout=30).returncode:
        pytest.skip("no user namespaces here")
    if Path("/proc/sys/vm/unprivileged_userfaultfd").read_text().strip() == "1":
        pytest.skip("here everybody may")
    line = host.fails("run", host.scenario(), within=_NO_USERFAULTFD)
    assert "userfaultfd: Operation not permitted" in line
    assert "/dev/userfaultfd" in line


def test_socket_in_use(host: Host) -> None:
    """What is in a socket's place and can not be cleared away is named."""
    (host.folder / "r/control.sock").mkdir(parents=True)
    assert f"{host.folder}/r/control.sock: Is a directory" in host.fails("agent")
    assert f"{host.folder}/r/control.sock: Is a directory" in host.fails("ls")


def test_runtime_directory_in_use(host: Host) -> None:
    with subprocess.Popen(
        [*_HVAQEMU, "agent"], env=host.environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as agent:
        try:
            while not (host.folder / "r/control.sock").is_socket() and agent.poll() is None:
                time.sleep(0.05)
            line = host.fails("agent")
        finally:
            agent.terminate()
            agent.wait(60)
    assert re.search(rf"{host.folder}/r: a host agent runs already, process {agent.pid}", line)


def test_runtime_directory_too_deep_for_sockets(host: Host) -> None:
    host.environment["HVAQEMU_RUNTIME_DIR"] = str(host.folder / ("r" * 60))
    assert "too long for the sockets below it" in host.fails("ls")


def test_name_taken_by_another_process(host: Host) -> None:
    (host.folder / "r").mkdir(mode=0o700)
    folder = VmFolder(host.folder / "r", "bad")
    try:
        assert host.fails("run", host.scenario()).startswith("VM bad: the name is taken")
    finally:
        folder.remove()


def test_socket_left_by_the_dead_is_no_obstacle(host: Host) -> None:
    """A VM directory nobody owns, with a socket in it, is cleared away: the run gets as far as QEMU."""
    place = host.folder / "r/vms/bad"
    place.mkdir(parents=True, mode=0o700)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(place / "qmp.sock"))
    assert "Cannot allocate memory" in host.fails("run", host.scenario(memory="100T"))


@_needs_mounts
@pytest.mark.parametrize("size", ["32M", "300M"])
def test_disk_full_while_building_an_image(host: Host, size: str) -> None:
    """Full while package lists are read, and while packages are unpacked."""
    cache = host.folder / "full"
    cache.mkdir()
    host.environment["HVAQEMU_CACHE_DIR"] = str(cache / "c")
    listing = host.folder / "listing"
    # The mount is seen in there only, and so is what is left on it.
    script = f'mount -t tmpfs -o size={size} none {cache}; "$@"; status=$?; find {cache} >{listing}; exit $status'
    line = host.fails("image", "build", within=("unshare", "-m", "sh", "-c", script, "sh"))
    assert line.startswith(f"{cache}/c/images: no space left on device")
    assert listing.read_text().split() == [str(path) for path in (cache, cache / "c", cache / "c/images")]


@_needs_mounts
def test_disk_full_for_the_vms_own_disks(host: Host) -> None:
    (host.folder / "s").mkdir(mode=0o700)
    listing = host.folder / "listing"
    script = f'mount -t tmpfs -o size=64k,mode=700 none s; "$@"; status=$?; find s >{listing}; exit $status'
    line = host.fails("run", host.scenario(), within=("unshare", "-m", "sh", "-c", script, "sh"))
    assert re.search(r"s/vms/bad/root\.qcow2: .*No space left on device", line)
    assert listing.read_text().split() == ["s", "s/vms"]


@_needs_mounts
def test_disk_full_for_an_index(host: Host) -> None:
    index = cache_dir() / "index"
    index.mkdir(mode=0o700, exist_ok=True)
    listing = host.folder / "listing"
    script = f'mount -t tmpfs -o size=64k,mode=700 none {index}; "$@"; status=$?; find {index} >{listing}; exit $status'
    line = host.fails("run", host.scenario(), within=("unshare", "-m", "sh", "-c", script, "sh"))
    assert re.search(r"/index/.*: No space left on device", line)
    assert listing.read_text().split() == [str(index)]


def test_no_qemu(host: Host) -> None:
    tools = host.folder / "tools"
    tools.mkdir()
    for name in ("qemu-img", "gcc", "cc"):
        if found := shutil.which(name):
            (tools / name).symlink_to(found)
    host.environment["PATH"] = str(tools)
    line = host.fails("run", host.scenario())
    assert line == "qemu-system-s390x: not found (install the package qemu-system-misc)"
