"""Images as a user asks for them: built, seen on a real guest, and refused in one line with nothing left behind."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hva_host.agent.fleet import Fleet
from hva_images import DEFAULT, ImageSpec, ensure_image, list_images, load_image_spec
from hva_images.debs import read_deb
from hva_images.firstboot import first_boot
from hvaqemu.config import VmConfig
from hvaqemu.errors import ConfigError, HostError
from hvaqemu.paths import runtime_dir
from hvaqemu.units import GiB, MiB
from tests.unit.image_stand_ins import make_deb
from tests.vm.harness import BOOT_SECONDS, Guest, nothing_left

#: An image or two may have to be built first.
pytestmark = pytest.mark.timeout(900)

_MINE = """\
name: test-mine
base: debian-s390x
packages: [fio, stress-ng]
files: {/opt/job.sh: ./job.sh}
size: 2G
"""
_TOOLS = "sh awk find xargs md5sum dd python3 busybox ps mount sync free sort grep sed gcc sqlite3 strace ip modprobe"
_FIO = "fio --name=job --filename=/root/fio.data --size=8M --rw=randwrite --bs=64k --verify=md5 --do_verify=1 --minimal"
_STRESS = "stress-ng --vm 1 --vm-bytes 16M --vm-ops 20 --verify --timeout 60"


async def test_packages_and_files_of_a_user(tmp_path: Path) -> None:
    (tmp_path / "job.sh").write_text("#!/bin/sh\necho the job ran as $(id -un)\n")
    (tmp_path / "job.sh").chmod(0o755)
    (tmp_path / "mine.yaml").write_text(_MINE)
    said: list[str] = []
    image = ensure_image("mine.yaml", base_dir=tmp_path, progress=said.append)
    assert image.size_bytes == 2 * GiB
    assert image.root.stat().st_mode & 0o777 == 0o444
    assert {"fio", "stress-ng", "python3", "libibverbs1:s390x"} <= image.packages.keys()
    assert [each.digest for each in list_images() if each.name == "test-mine"].count(image.digest) == 1
    assert all(0 < len(line) < 100 and "\n" not in line for line in said)

    name = "imaged"
    fleet = Fleet(runtime_dir(), embedded=True, on_event=lambda event, data: None)
    config = VmConfig(
        name=name,
        image=load_image_spec(tmp_path / "mine.yaml"),
        memory=512 * MiB,
        cpus=2,
        allow_exec=True,
        boot_timeout=BOOT_SECONDS,
    )
    try:
        guest = Guest(fleet, await fleet.up(config, print), [])
        missing = await guest.run(f"for each in {_TOOLS}; do command -v $each >/dev/null || echo $each; done")
        assert missing == ""
        assert await guest.run("/opt/job.sh") == "the job ran as root\n"
        # dpkg knows what is there, of what was unpacked by the builder and of what it installed itself.
        assert "Status: install ok installed" in await guest.run("dpkg -s fio")
        assert "Status: install ok installed" in await guest.run("dpkg -s libibverbs1")
        assert await guest.run("dpkg --audit") == ""
        states = await guest.run("dpkg-query -W -f '${db:Status-Abbrev}\n' | sort -u")
        assert states.split() == ["ii"]
        assert int(await guest.run("dpkg-query -W -f 'x\n' | wc -l")) == len(image.packages)
        # This group is made by a maintainer script.
        assert (await guest.run("getent group rdma")).startswith("rdma:")
        assert (await guest.run(_FIO)).split(";")[4] == "0"
        await guest.run(f"{_STRESS} 2>&1")
        await guest.run(
            "echo 'int main(){return 0;}' >/root/a.c && gcc -o /root/a /root/a.c && /root/a && modprobe xfs"
        )
        assert "/bin/busybox" in await guest.run("readlink /proc/1/exe")
        # Orphans are collected by process 1.
        await guest.run("(sleep 0.1 & ) ; sleep 2")
        assert "<defunct>" not in await guest.run("ps -e")
        assert await guest.run("cat /etc/machine-id; ls /usr/sbin/policy-rc.d /mnt 2>/dev/null; true") == "/mnt:\n"
        assert await guest.complaints() == []
    finally:
        await fleet.close()
    await nothing_left(name)


def test_what_is_cached_comes_at_once_and_needs_no_tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = ensure_image(DEFAULT, base_dir=tmp_path, progress=print)
    assert image.usr_bytes >= 380 * MiB
    monkeypatch.setenv("PATH", "")
    said: list[str] = []
    started = time.monotonic()
    assert ensure_image(DEFAULT, base_dir=tmp_path, progress=said.append) == image
    assert time.monotonic() - started < 20
    assert said == []


def test_a_package_that_can_not_be_configured_is_named(tmp_path: Path) -> None:
    image = ensure_image(DEFAULT, base_dir=tmp_path, progress=print)
    root = tmp_path / "root.ext4"
    subprocess.run(["cp", "--sparse=always", image.root, root], check=True)
    root.chmod(0o600)
    script = "#!/bin/sh\necho deliberately broken >&2\nexit 7\n"
    debs = [
        read_deb(make_deb(tmp_path, "good", files={"/usr/bin/good": "x"})),
        read_deb(make_deb(tmp_path, "broken", info={"postinst": script})),
    ]
    with pytest.raises(HostError) as caught:
        first_boot(root, image.kernel, image.initrd, debs, tmp_path, print)
    message = str(caught.value)
    assert "configured in the image: broken (" in message
    assert "deliberately broken" in message
    assert "exit status 7" in message
    assert "\n" not in message


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own, in a place whose name would break a list of options."""
    cache = tmp_path / "cache, of=mine"
    monkeypatch.setenv("HVAQEMU_CACHE_DIR", str(cache))
    return cache / "images"


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (ImageSpec(name="bad", packages=("no-such-package",)), "no package no-such-package for s390x"),
        (ImageSpec(name="bad", packages=("busybox-static",)), "do not go together"),
    ],
)
def test_packages_that_can_not_be_had(empty_cache: Path, tmp_path: Path, spec: ImageSpec, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        ensure_image(spec, base_dir=tmp_path, progress=print)
    assert "\n" not in str(caught.value)
    assert list(empty_cache.iterdir()) == []


def test_no_archive_to_be_reached(empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = tmp_path / "mirror.list"
    sources.write_text("deb http://127.0.0.1:9/debian bookworm main\n")
    monkeypatch.setenv("HVAQEMU_APT_SOURCES", str(sources))
    with pytest.raises(HostError, match=r"fetching packages: .*127\.0\.0\.1"):
        ensure_image(DEFAULT, base_dir=tmp_path, progress=print)
    assert list(empty_cache.iterdir()) == []


def test_a_tool_that_is_missing(empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "setpriv").symlink_to(shutil.which("setpriv") or "/usr/bin/setpriv")
    monkeypatch.setenv("PATH", str(tools))
    with pytest.raises(HostError, match=r"mmdebstrap is not installed \(apt install mmdebstrap\)"):
        ensure_image(DEFAULT, base_dir=tmp_path, progress=print)
    assert list(empty_cache.iterdir()) == []


_BUILD = """
import sys
from pathlib import Path
from hva_images import DEFAULT, ensure_image
from hvaqemu.errors import HvaError
try:
    ensure_image(DEFAULT, base_dir=Path.cwd(), progress=lambda line: print(line, flush=True))
except HvaError as error:
    print(f"{type(error).__name__}: {error}", flush=True)
"""


def test_a_full_disk(empty_cache: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    in_own_mounts = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    mount = f"mount -t tmpfs -o size=100m small {small}"
    if subprocess.run([*in_own_mounts, mount], capture_output=True).returncode != 0:
        pytest.skip("this host lets nobody mount a small file system for himself")
    environment = {**os.environ, "HVAQEMU_CACHE_DIR": str(small / "cache")}
    script = f'{mount} && "$0" -c "$1"; ls -A {small}/cache/images'
    done = subprocess.run(
        [*in_own_mounts, script, sys.executable, _BUILD], capture_output=True, text=True, env=environment, timeout=600
    )
    last = done.stdout.splitlines()[-1]
    assert last == f"HostError: {small}/cache/images: no space left on device (building an image takes about 2 GiB)"


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_build_that_is_interrupted(empty_cache: Path, tmp_path: Path, how: signal.Signals) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", _BUILD], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout is not None
        while "downloading" not in (line := process.stdout.readline()):
            assert line, "the build ended"
        process.send_signal(how)
        process.wait(60)
    if how == signal.SIGKILL:
        assert [path.name.endswith(".building") for path in sorted(empty_cache.iterdir())] == [True, False]
        with pytest.raises(ConfigError, match="no package no-such"):
            ensure_image(ImageSpec(name="next", packages=("no-such",)), base_dir=tmp_path, progress=print)
    assert list(empty_cache.iterdir()) == []
