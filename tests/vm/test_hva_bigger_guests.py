"""A guest of 16 GiB, most of it never touched: gone through in slices, every byte right."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from hva_host.agent.model import VmStatus
from hvaqemu.units import MiB
from tests.vm.host import Host, own_host

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(1800)]

_LIMIT = 2.0
_VM = f"name: big\nmemory: 16G\ncpus: 2\nallow_exec: true\nboot_timeout: 240s\nprotection_limit: {_LIMIT:g}s\n"
_FILL = """
mkdir /t && mount -t tmpfs -o size=8G tmpfs /t
dd if=/dev/urandom of=/t/seed bs=1M count=32 2>/dev/null
for i in 1 2 3 4 5 6 7 8; do cat /t/seed > /t/$i; done
find /usr/lib -xdev -type f -print0 | xargs -0 cat | md5sum
cat /t/* | md5sum
rm /t/5 /t/6 /t/7 /t/8
cat /t/* | md5sum
"""
_CHECK = "cat /t/* | md5sum; find /usr/lib -xdev -type f -print0 | xargs -0 cat | md5sum; dmesg -l err,crit,alert,emerg"
_AGENT_MEMORY = "grep -h VmHWM $(grep -l hva/agent.pyz /proc/[0-9]*/cmdline | head -1 | sed s/cmdline/status/)"
#: What a guest agent may need, however large its guest is.
_AGENT_KIB = 20 * 1024


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    with own_host() as made:
        yield made


async def test_a_guest_of_16_gib(host: Host) -> None:
    file = host.folder / "big.yaml"
    file.write_text(_VM)
    await host.command("up", file)
    filled = await host.command("exec", "big", "--timeout", "500s", "--", "sh", "-c", _FILL)
    files, _, kept = filled.splitlines()
    before = VmStatus.model_validate(json.loads(await host.command("status", "big", "--json")))
    assert before.measure is not None
    await host.command("reclaim", "big")
    status = VmStatus.model_validate(json.loads(await host.command("status", "big", "--json")))
    assert status.measure is not None
    # The four files that were deleted, and the page cache; all of it copies or confirmed free.
    assert before.measure.backing_bytes - status.measure.backing_bytes > 4 * 32 * MiB
    assert sum(epoch.discarded_layer for epoch in status.epochs) > 40 * MiB // 4096
    assert max(epoch.slices for epoch in status.epochs) > 1
    assert all(epoch.unconfirmed < 1000 for epoch in status.epochs[1:]), status.epochs
    checked = await host.command("exec", "big", "--timeout", "500s", "--", "sh", "-c", _CHECK)
    assert checked.splitlines() == [kept, files]
    peak = await host.command("exec", "big", "--", "sh", "-c", _AGENT_MEMORY)
    assert 0 < int(peak.split()[1]) < _AGENT_KIB
    await host.command("down", "big")
