"""An ordinary user without any capability, who may open /dev/userfaultfd, made without changing anything of the host.

The user has a number that nobody has, and sees a device file of his own in a mount namespace. He has a home, and in its
cache the built image; everything else is what any user of the host has.
"""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

from hva_images import ensure_image
from hvaqemu.image_config import DEFAULT_IMAGE

NUMBER = 64321
_SECONDS = 1500.0
_DEVICE = Path("/dev/userfaultfd")

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


def why_no_user() -> str:
    """Why there can be no such user here; empty where there can."""
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
        subprocess.run(["chown", "-R", f"{NUMBER}:{NUMBER}", self.home], check=True, timeout=60)

    def __call__(self, *command: str | Path, mode: int = 0o660) -> subprocess.CompletedProcess[str]:
        """Run a command as the user.

        :param mode: of the device, which belongs to root and to the user's group.
        """
        numbers = _DEVICE.stat().st_rdev
        given = [self.folder, os.major(numbers), os.minor(numbers), f"{mode:o}", NUMBER]
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
