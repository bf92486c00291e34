"""The least privileges that suffice: an ordinary user, without any capability, who may open /dev/userfaultfd.

The user has a number that nobody has, and sees a device file of his own in a mount namespace: nothing of the host is
changed. He has a home, and in its cache the built image; everything else is what any user of the host has.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from hva_images import ensure_image
from hvaqemu.image_config import DEFAULT_IMAGE

_USER = 64321
_SECONDS = 600.0
_DEVICE = Path("/dev/userfaultfd")
_EXAMPLES = Path(__file__).parents[2] / "examples"
_VM = "name: mine\nmemory: 128M\n"

#: $1: a folder; $2: the device's numbers; $3: its mode; $4: user; then the command.
_NAMESPACE = """
set -e
folder=$1 major=$2 minor=$3 mode=$4 user=$5
shift 5
mount -t tmpfs -o mode=755 none "$folder/dev"
mknod -m "$mode" "$folder/dev/userfaultfd" c "$major" "$minor"
chown "root:$user" "$folder/dev/userfaultfd"
mount --bind "$folder/dev/userfaultfd" /dev/userfaultfd
exec setpriv --reuid "$user" --regid "$user" --clear-groups --no-new-privs --inh-caps=-all --bounding-set=-all "$@"
"""

pytestmark = pytest.mark.timeout(_SECONDS)


def _why_not() -> str:
    if os.geteuid() != 0:
        return "only root can become another user"
    if not _DEVICE.is_char_device():
        return "this kernel has no /dev/userfaultfd"
    if Path("/proc/sys/vm/unprivileged_userfaultfd").read_text().strip() == "1":
        return "here everybody may use userfaultfd"
    for tool in ("unshare", "setpriv"):
        if shutil.which(tool) is None:
            return f"{tool} is not installed"
    if subprocess.run(["unshare", "-m", "true"], capture_output=True, timeout=30).returncode:
        return "no mount namespaces here"
    parents = [Path(sys.executable), *Path(sys.executable).parents, *Path(__file__).parents]
    if closed := [path for path in parents if not path.stat().st_mode & stat.S_IXOTH]:
        return f"{closed[-1]} is closed to other users"
    return ""


@pytest.fixture(scope="module")
def user() -> Iterator[User]:
    if why := _why_not():
        pytest.skip(why)
    # Not pytest's own, whose folders are closed to others.
    with tempfile.TemporaryDirectory(prefix="hvp-", dir="/tmp") as folder:
        yield User(Path(folder))


class User:
    """An ordinary user with a home."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.chmod(0o755)
        (folder / "dev").mkdir()
        self.home = folder / "home"
        images = self.home / ".cache/hvaqemu/images"
        images.mkdir(parents=True)
        image = ensure_image(DEFAULT_IMAGE, base_dir=Path.cwd(), progress=print)
        subprocess.run(
            ["cp", "-a", "--sparse=always", "--reflink=auto", image.directory, images], check=True, timeout=120
        )
        (self.home / "run").mkdir()
        subprocess.run(["chown", "-R", f"{_USER}:{_USER}", self.home], check=True, timeout=60)

    def __call__(self, *command: str | Path, mode: int = 0o660) -> subprocess.CompletedProcess[str]:
        """Run a command as the user.

        :param mode: of the device, which belongs to root and to the user's group.
        """
        numbers = _DEVICE.stat().st_rdev
        given = [self.folder, os.major(numbers), os.minor(numbers), f"{mode:o}", _USER]
        return subprocess.run(
            ["unshare", "-m", "--propagation", "private", "sh", "-c", _NAMESPACE, "sh", *map(str, given), *command],
            capture_output=True,
            text=True,
            env={
                "HOME": str(self.home),
                "XDG_RUNTIME_DIR": str(self.home / "run"),
                "PATH": "/usr/local/bin:/usr/bin:/bin",
            },
            cwd=self.home,
            timeout=_SECONDS,
        )

    def hvaqemu(self, *words: str | Path, mode: int = 0o660) -> subprocess.CompletedProcess[str]:
        return self(sys.executable, "-m", "hva_host.cli.main", *words, mode=mode)

    def left(self) -> list[Path]:
        """What there is of VMs."""
        places = (self.home / "run/hvaqemu/vms", self.home / ".local/state/hvaqemu/vms")
        return [path for place in places for path in place.glob("*")]


def test_the_user_is_an_ordinary_one(user: User) -> None:
    said = user("cat", "/proc/self/status").stdout
    found = dict(line.split(":", 1) for line in said.splitlines())
    assert found["Uid"].split() == found["Gid"].split() == [str(_USER)] * 4
    assert found["Groups"].split() == []
    assert found["NoNewPrivs"].strip() == "1"
    for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        assert int(found[name], 16) == 0, name
    assert user("test", "-r", "/etc/shadow").returncode == 1


def test_doctor_is_content(user: User) -> None:
    done = user.hvaqemu("doctor", "--json")
    checks = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    lacking = [check for check in checks.values() if check["needed"] and not check["ok"]]
    assert lacking == []
    assert done.returncode == 0
    assert checks["userfaultfd"]["found"] == "allowed: /dev/userfaultfd"
    assert checks["user"]["found"] == f"ordinary user {_USER}"
    assert checks["read leases on layers"]["ok"]
    # What it could use and does without.
    assert not checks["last for the OOM killer"]["ok"]
    assert "may pick a pager" in checks["last for the OOM killer"]["found"]


def test_the_quickstart_byte_for_byte(user: User) -> None:
    report = user.home / "report.json"
    done = user.hvaqemu("run", _EXAMPLES / "quickstart.yaml", "--json", report)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    found = json.loads(report.read_text())
    assert found["ok"] is True
    assert found["failures"] == []
    saved, measures = found["saved"], found["measures"]
    assert saved["before"] == saved["after"] == saved["finally"]
    assert len(saved["before"].split()[0]) == 32
    assert measures["reclaimed"]["layer_pages"] > 50_000
    assert measures["reclaimed"]["backing_bytes"] <= 0.17 * measures["filled"]["backing_bytes"]
    assert user.left() == []
    strangers = [path for path in user.home.rglob("*") if path.lstat().st_uid != _USER]
    assert strangers == []


@pytest.mark.parametrize("mode", [0o600, 0o640])
def test_without_the_device_it_says_what_is_missing(user: User, mode: int) -> None:
    done = user.hvaqemu("doctor", mode=mode)
    assert done.returncode == 1
    failed = [line for line in done.stdout.splitlines() if line.startswith("FAIL")]
    assert len(failed) == 1
    assert failed[0].split()[1] == "userfaultfd"
    assert f"setfacl -m u:{_USER}:rw /dev/userfaultfd" in done.stdout
    file = user.home / "vm.yaml"
    file.write_text(_VM)
    stop = shlex.join([sys.executable, "-m", "hva_host.cli.main", "agent", "--stop"])
    up = shlex.join([sys.executable, "-m", "hva_host.cli.main", "up", str(file)])
    done = user("sh", "-c", f"{up}; status=$?; {stop} 2>/dev/null; exit $status", mode=mode)
    assert done.returncode == 1
    complaints = [line for line in done.stderr.splitlines() if line.startswith("hvaqemu: ")]
    assert len(complaints) == 1
    assert "userfaultfd: Operation not permitted" in complaints[0]
    assert "/dev/userfaultfd made readable and writable for you" in complaints[0]
    assert user.left() == []
