"""The least privileges that suffice: an ordinary user, without any capability, who may open /dev/userfaultfd.

The user is made as ``ordinary_user.py`` says: nothing of the host is changed.
"""

from __future__ import annotations

import json
import shlex
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.vm.ordinary_user import NUMBER, User, why_no_user
from tests.vm.quickstart import EXAMPLE, holds_all_it_promises

_VM = "name: mine\nmemory: 128M\n"

pytestmark = pytest.mark.timeout(1800)


@pytest.fixture(scope="module")
def user() -> Iterator[User]:
    if why := why_no_user():
        pytest.skip(why)
    # Not pytest's own, whose folders are closed to others.
    with tempfile.TemporaryDirectory(prefix="hvp-", dir="/tmp") as folder:
        yield User(Path(folder))


def test_the_user_is_an_ordinary_one(user: User) -> None:
    said = user("cat", "/proc/self/status").stdout
    found = dict(line.split(":", 1) for line in said.splitlines())
    assert found["Uid"].split() == found["Gid"].split() == [str(NUMBER)] * 4
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
    assert checks["user"]["found"] == f"ordinary user {NUMBER}"
    assert checks["read leases on layers"]["ok"]
    # What it could use and does without.
    assert not checks["last for the OOM killer"]["ok"]
    assert "may pick a pager" in checks["last for the OOM killer"]["found"]


def test_the_quickstart_holds_all_it_promises(user: User) -> None:
    report, folder = user.home / "report.json", user.home / "report"
    done = user.hvaqemu("run", EXAMPLE, "--json", report, "--report", folder)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    assert "PASSED" in done.stdout
    holds_all_it_promises(report, folder)
    assert user.left() == []
    strangers = [path for path in user.home.rglob("*") if path.lstat().st_uid != NUMBER]
    assert strangers == []


@pytest.mark.parametrize("mode", [0o600, 0o640])
def test_without_the_device_it_says_what_is_missing(user: User, mode: int) -> None:
    done = user.hvaqemu("doctor", mode=mode)
    assert done.returncode == 1
    failed = [line for line in done.stdout.splitlines() if line.startswith("FAIL")]
    assert len(failed) == 1
    assert failed[0].split()[1] == "userfaultfd"
    assert f"setfacl -m u:{NUMBER}:rw /dev/userfaultfd" in done.stdout
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
