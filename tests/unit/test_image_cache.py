"""The image cache: whole images or none, one builder at a time; and the programs that building runs."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hva_images import DEFAULT, ImageSpec, cache, ensure_image, list_images
from hva_images.commands import run
from hva_images.spec import resolve
from hvaqemu.errors import ConfigError, DeadlineExceeded, HostError


@pytest.fixture(autouse=True)
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HVAQEMU_CACHE_DIR", str(tmp_path / "cache"))
    return cache.images_dir()


def facts(name: str = "one", digest: str = "0" * 64, system: str = "s") -> dict[str, object]:
    return {
        "name": name,
        "digest": digest,
        "system": system,
        "kernel_args": "rw",
        "size_bytes": 4,
        "packages": {"a": "1"},
        "sha256": {},
        "usr_bytes": 5,
    }


def fill(directory: Path, **more: str) -> None:
    for name in (cache.KERNEL, cache.INITRD, cache.ROOT):
        (directory / name).write_text("four")
    cache.write_manifest(directory, facts(**more))


def build(**more: str) -> Path:
    directory = cache.place(str(facts(**more)["name"]), str(facts(**more)["digest"]))
    with cache.exclusive(directory), cache.staging(directory) as staging:
        fill(staging, **more)
    return directory


def test_an_image_is_kept_and_listed() -> None:
    directory = build()
    build(name="two", system="t")
    image = cache.load(directory)
    assert image is not None
    assert (image.name, image.root, image.usr_bytes) == ("one", directory / "root.ext4", 5)
    assert [each.name for each in list_images()] == ["one", "two"]
    assert cache.same_system("two", "t") is not None
    assert cache.same_system("one", "t") is None
    assert [path.name for path in cache.images_dir().iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), HostError("x")])
def test_a_build_that_fails_leaves_nothing(images: Path, error: BaseException) -> None:
    directory = cache.place("one", "0" * 64)
    with pytest.raises(type(error)), cache.exclusive(directory), cache.staging(directory) as staging:
        fill(staging)
        (staging / "deep/dir").mkdir(parents=True)
        (staging / "deep/dir/file").write_text("")
        (staging / "deep/dir").chmod(0o500)
        raise error
    assert list(images.iterdir()) == []


def test_what_is_not_whole_is_no_image(images: Path) -> None:
    directory = build()
    (directory / cache.ROOT).write_text("cut")
    assert cache.load(directory) is None
    assert list_images() == []
    build()
    assert cache.load(directory) is not None
    (directory / cache.MANIFEST).write_text('{"name": 1')
    assert cache.load(directory) is None
    assert cache.load(images / "nowhere") is None


_HOLD = """
import sys, time
from pathlib import Path
from hva_images import cache
directory = Path(sys.argv[1])
with cache.exclusive(directory), cache.staging(directory) as staging:
    print("held", flush=True)
    sys.stdin.readline()
"""


def holder(directory: Path) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        [sys.executable, "-c", _HOLD, directory], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    return process


def test_one_builds_and_another_waits(images: Path) -> None:
    directory = cache.place("one", "0" * 64)
    with holder(directory) as first:
        second = subprocess.Popen(
            [sys.executable, "-c", _HOLD, directory], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ
        )
        with second:
            assert second.stdout is not None
            os.set_blocking(second.stdout.fileno(), False)
            time.sleep(1.0)
            assert second.stdout.read() is None
            first.communicate(b"\n", timeout=20)
            os.set_blocking(second.stdout.fileno(), True)
            assert second.stdout.readline() == b"held\n"
            second.communicate(b"\n", timeout=20)
    assert (first.returncode, second.returncode) == (0, 0)
    assert [path.name for path in images.iterdir()] == [directory.name]


def test_the_leftovers_of_a_killed_build_are_swept_and_a_running_one_is_not(images: Path) -> None:
    dead, live = cache.place("dead", "0" * 64), cache.place("live", "0" * 64)
    with holder(dead) as killed:
        killed.kill()
    with holder(live) as running:
        assert len(list(images.glob(".*.building"))) == 2
        cache.sweep()
        assert [path.name for path in images.glob(".*.building")] == [f".{live.name}.building"]
        running.communicate(b"\n", timeout=20)


def test_what_a_reference_means(tmp_path: Path) -> None:
    assert resolve(DEFAULT, tmp_path).packages == ()
    (tmp_path / "mine.yaml").write_text("{name: mine, packages: [fio], files: {/opt/x: ./x}, size: 2G}")
    wanted = resolve("mine.yaml", tmp_path)
    assert (wanted.name, wanted.packages, wanted.size) == ("mine", ("fio",), 2 << 30)
    assert wanted.files == {"/opt/x": tmp_path / "x"}
    assert resolve(ImageSpec(name="direct"), tmp_path).name == "direct"
    for reference, said in (
        ("debian-s391x", "no such image"),
        ("other.yaml", "No such file"),
        ("./x/y", "No such file"),
    ):
        with pytest.raises(ConfigError, match=said):
            resolve(reference, tmp_path)


def test_files_that_can_not_be_taken_are_said_before_anything_is_fetched(tmp_path: Path, images: Path) -> None:
    (tmp_path / "folder").mkdir()
    for host, said in (("missing", "No such file"), ("folder", "is not a file")):
        with pytest.raises(ConfigError, match=said) as caught:
            ensure_image(ImageSpec(name="mine", files={"/opt/x": Path(host)}), base_dir=tmp_path, progress=print)
        assert "/opt/x" in str(caught.value)
    assert list(images.iterdir()) == []


def test_a_program_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(HostError, match=r"no-such-program is not installed \(apt install no-such-program\)"):
        run(["no-such-program"], what="testing", deadline=5)


def test_a_program_that_fails_says_why() -> None:
    said: list[str] = []
    script = "echo out; echo first >&2; echo 'E: the \x1b[31mreason' >&2; echo last >&2; exit 3"
    with pytest.raises(HostError) as caught:
        run(["sh", "-c", script], what="testing", deadline=20, on_line=said.append)
    assert str(caught.value) == "testing: sh: the ?[31mreason"
    assert said == ["first", "E: the \x1b[31mreason", "last"]
    with pytest.raises(HostError, match="ended with status 3"):
        run(["sh", "-c", "exit 3"], what="testing", deadline=20)


@pytest.mark.parametrize("line", ["cp: No space left on device", "E: You don't have enough free space in /x/."])
def test_a_full_disk_is_told_apart(line: str) -> None:
    with pytest.raises(HostError, match="no space left on device"):
        run(["sh", "-c", f'echo "{line}" >&2; echo E: other >&2; exit 1'], what="testing", deadline=20)


def test_output_and_input() -> None:
    assert run(["cat"], what="testing", deadline=20, stdin=b"x" * 200_000) == b"x" * 200_000
    assert run(["true"], what="testing", deadline=20, stdin=b"x" * 200_000) == b""
    lines: list[str] = []
    assert (
        run(["sh", "-c", "echo a; echo b >&2"], what="testing", deadline=20, on_line=lines.append, console=True) == b""
    )
    assert sorted(lines) == ["a", "b"]


def test_the_deadline_ends_children_too(tmp_path: Path) -> None:
    started = time.monotonic()
    with pytest.raises(DeadlineExceeded, match="sh took longer"):
        run(["sh", "-c", f"(sleep 2; touch {tmp_path}/late) & sleep 60"], what="testing", deadline=0.5)
    assert time.monotonic() - started < 10
    time.sleep(2.5)
    assert not (tmp_path / "late").exists()


def test_a_program_ends_with_the_process_that_runs_it(tmp_path: Path) -> None:
    source = (
        "from hva_images.commands import run\n"
        f"run(['sh', '-c', 'echo $$ > {tmp_path}/pid; exec sleep 60'], what='testing', deadline=60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", source]) as process:
        pid = tmp_path / "pid"
        deadline = time.monotonic() + 20
        while not (pid.exists() and pid.read_text().strip()):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.kill()
    victim = Path(f"/proc/{pid.read_text().strip()}/stat")
    deadline = time.monotonic() + 20
    while victim.exists() and victim.read_text().split(") ")[1][0] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.02)
