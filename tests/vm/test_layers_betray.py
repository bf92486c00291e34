"""The golden image altered, cut, replaced, unlinked and lost under a running guest: never a wrong byte.

What still matches is served. What does not makes the VM HELD, which everybody is told, and which ends by a repair.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager, suppress
from pathlib import Path

import pytest
import pytest_asyncio

from hva_host.agent.model import VmState
from hvaqemu.errors import HvaError, PeerLost, RefusedError
from hvaqemu.units import MiB
from tests.vm.betrayal import Dependants, Golden
from tests.vm.harness import BOTH, STEP_SECONDS, TREE, Guest, alive, running_guest, until

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(600)]

_MEMORY = 512 * MiB
#: Seconds for what must not wait for a guest or a QEMU that stands still. Whoever waits for QMP does so for 10 s.
_AT_ONCE = 8.0
_PART = "find /usr/sbin -xdev -type f -print0 | sort -z | xargs -0 md5sum | md5sum"
#: Pagers that were killed here, in order.
_killed: list[int] = []
_WRITER = "import os, sys; os.open(sys.argv[1], os.O_RDWR); print('open', flush=True); sys.stdin.read()"


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Golden]:
    folder = tmp_path_factory.mktemp("golden")
    made = Golden(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HVAQEMU_CACHE_DIR", str(made.cache))
        yield made
    shutil.rmtree(folder)


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def guest(golden: Golden) -> AsyncIterator[Guest]:
    async with running_guest("betrayed", memory=_MEMORY) as found:
        yield found
        # No pager died of what happened to files: SIGBUS would be a death that nobody here wanted.
        assert [data["pid"] for name, data in found.events if name == "PAGER_LOST"] == _killed


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def part(guest: Guest) -> str:
    """The checksum of a part of the tree."""
    return await guest.run(_PART)


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def digest(guest: Guest, part: str) -> str:
    """The checksum of the whole tree. After this, and after each test, all of it is in the guest's page cache."""
    return await guest.tree_digest()


async def discard(guest: Guest) -> Dependants:
    """Discard the page cache of a guest that has read its tree; the pages that depend on the layer."""
    async with asyncio.timeout(STEP_SECONDS):
        while True:
            try:
                await guest.vm.reclaim(BOTH)
                break
            except RefusedError:
                # What an earlier test repaired may be noticed only now, and is compared first.
                await until(lambda: not guest.vm.refusals.text, STEP_SECONDS, "a layer that is right")
    dependants = Dependants(guest.qemu_pid, _MEMORY)
    assert len(dependants.pfns) > 6_000
    return dependants


async def kill_pager(guest: Guest) -> None:
    """Have another pager attach in the state things are in."""
    pid, started = guest.vm.pager.pid, guest.heard("PAGER_STARTED")
    _killed.append(pid)
    os.kill(pid, signal.SIGKILL)
    await until(lambda: guest.heard("PAGER_STARTED") > started, STEP_SECONDS, "another pager")
    assert guest.vm.pager.pid != pid
    assert alive(guest.vm.pager.pid)


async def is_held(guest: Guest, golden: Golden, wrong: set[int], pattern: str) -> None:
    """Wait until the VM is HELD for pages among ``wrong``; everybody is told so, at once."""
    await until(lambda: guest.vm.state is VmState.HELD, STEP_SECONDS, "a VM that is HELD")
    async with asyncio.timeout(STEP_SECONDS):
        while True:
            async with asyncio.timeout(_AT_ONCE):
                status = await guest.vm.status()
            if status.state is VmState.HELD and status.held:
                break
            # A pager that has just attached holds nothing before somebody touches it.
            await asyncio.sleep(0.05)
    assert all(held.layer == str(golden.root) for held in status.held)
    pages = {page for held in status.held for page in held.pages}
    assert pages <= wrong
    assert re.search(pattern, status.reason)
    assert str(golden.root) in status.reason
    assert guest.heard("VM_HELD") > 0
    for asked in (guest.vm.reclaim(BOTH), guest.vm.restore(), guest.vm.execute(["true"], timeout=600)):
        with pytest.raises(RefusedError) as refused:
            async with asyncio.timeout(_AT_ONCE):
                await asked
        line = str(refused.value)
        assert line.startswith(f"VM {guest.vm.name} is HELD: ")
        assert str(golden.root) in line
        assert f"{status.held[0].pages[0]}" in line
        assert f"'hvaqemu resume {guest.vm.name}'" in line
        assert "\n" not in line


async def goes_on(guest: Guest, reading: asyncio.Task[str], digest: str) -> None:
    """After a repair: one `resume`, and everything is as it was."""
    async with asyncio.timeout(_AT_ONCE):
        assert await guest.vm.resume() == 0
    assert await reading == digest
    assert guest.vm.state is VmState.RUNNING
    await is_trusted(guest)
    assert (await guest.vm.reclaim(BOTH)).discarded > 3_000
    assert await guest.tree_digest() == digest
    assert await guest.complaints() == []


async def is_trusted(guest: Guest) -> None:
    """Wait until the layer is what it was, and may be depended on again."""
    await until(lambda: not guest.vm.layers.reason, STEP_SECONDS, "a layer that is right")
    assert not (await guest.vm.status()).reclaim_refused


@asynccontextmanager
async def read_meanwhile(guest: Guest) -> AsyncIterator[asyncio.Task[str]]:
    """The guest reads what was discarded; if the test fails before that ends, it is let go on all the same."""
    reading = asyncio.create_task(guest.tree_digest())
    try:
        yield reading
    finally:
        if not reading.done():
            with suppress(HvaError):
                await guest.vm.resume()
            await asyncio.wait({reading}, timeout=STEP_SECONDS)
            reading.cancel()


async def is_said(guest: Guest, pattern: str) -> None:
    """Wait until this is said of the layer."""
    await until(lambda: re.search(pattern, guest.vm.layers.reason), STEP_SECONDS, f"{pattern}, said of the layer")
    assert re.search(pattern, (await guest.vm.status()).reclaim_refused)


async def is_refused(guest: Guest, pattern: str) -> None:
    """Wait until nothing is discarded any more for what happened to the layer."""
    await is_said(guest, pattern)
    with pytest.raises(RefusedError, match=pattern):
        await guest.vm.reclaim(BOTH)


@pytest.mark.parametrize("killed", [False, True])
async def test_altered_in_place(guest: Guest, golden: Golden, digest: str, killed: bool) -> None:
    before = await discard(guest)
    blocks = before.some_blocks(8)
    async with read_meanwhile(guest) as reading:
        # What is served before the image is altered is right; some must be, for what follows to say anything of it.
        await until(
            lambda: len(Dependants(guest.qemu_pid, _MEMORY).pfns) < len(before.pfns), STEP_SECONDS, "a page served"
        )
        await golden.alter(blocks)
        wrong = Dependants(guest.qemu_pid, _MEMORY).on(blocks)
        try:
            await is_held(guest, golden, wrong, r"block \d+ has changed")
            await is_said(guest, "does not hold what was indexed")
            # What was read and compared before may have come back a moment after.
            stuck = Dependants(guest.qemu_pid, _MEMORY).on(blocks)
            assert stuck <= wrong
            if killed:
                await kill_pager(guest)
                await is_held(guest, golden, wrong, r"block \d+ has changed")
            # Of what does not match, nothing ever was served.
            assert Dependants(guest.qemu_pid, _MEMORY).on(blocks) == stuck
            assert await guest.vm.resume() > 0
            assert guest.vm.state is VmState.HELD
        finally:
            await golden.repair(blocks)
        await goes_on(guest, reading, digest)


@pytest.mark.parametrize("killed", [False, True])
async def test_truncated(guest: Guest, golden: Golden, digest: str, killed: bool) -> None:
    before = await discard(guest)
    blocks = sorted(set(before.blocks.tolist()))
    cut = blocks[len(blocks) * 3 // 4]
    async with read_meanwhile(guest) as reading:
        await golden.cut(cut)
        after = Dependants(guest.qemu_pid, _MEMORY)
        wrong = set(after.pfns[after.blocks >= cut].tolist())
        try:
            await is_held(guest, golden, wrong, "ends inside block|has changed|no block")
            await is_said(guest, r"was .* long and is")
            # As above.
            stuck = wrong.intersection(Dependants(guest.qemu_pid, _MEMORY).pfns.tolist())
            if killed:
                await kill_pager(guest)
                await is_held(guest, golden, wrong, "ends inside block|has changed|no block")
            assert stuck <= set(Dependants(guest.qemu_pid, _MEMORY).pfns.tolist())
        finally:
            await golden.lengthen()
        await goes_on(guest, reading, digest)


@contextmanager
def _replaced(golden: Golden) -> Iterator[None]:
    aside = golden.root.rename(golden.root.with_suffix(".aside"))
    golden.root.write_bytes(b"not an image" * 512)
    yield
    aside.replace(golden.root)


@contextmanager
def _unlinked(golden: Golden) -> Iterator[None]:
    aside = golden.root.with_suffix(".aside")
    os.link(golden.root, aside)
    golden.root.unlink()
    yield
    aside.rename(golden.root)


@contextmanager
def _unreadable(golden: Golden) -> Iterator[None]:
    golden.root.chmod(0)
    yield
    golden.root.chmod(0o600)


@contextmanager
def _cache_gone(golden: Golden) -> Iterator[None]:
    aside = golden.cache.rename(golden.cache.with_name("aside"))
    yield
    # Whoever started meanwhile may have made what it needed anew.
    shutil.rmtree(golden.cache, ignore_errors=True)
    aside.rename(golden.cache)


@contextmanager
def _index_deleted(golden: Golden) -> Iterator[None]:
    golden.index.unlink()
    yield


@contextmanager
def _index_cut(golden: Golden) -> Iterator[None]:
    index = golden.index
    right = index.read_bytes()
    index.chmod(0o600)
    os.truncate(index, len(right) // 2)
    yield
    index.write_bytes(right)


@contextmanager
def _index_damaged(golden: Golden) -> Iterator[None]:
    index = golden.index
    right = index.read_bytes()
    index.chmod(0o600)
    index.write_bytes(right[: len(right) // 2] + os.urandom(len(right) - len(right) // 2))
    yield
    index.write_bytes(right)


@pytest.mark.parametrize(
    ("betray", "reason"),
    [
        (_replaced, r"was .* long and is"),
        (_unlinked, "No such file"),
        (_unreadable, ""),
        (_cache_gone, "No such file"),
        (_index_damaged, ""),
        (_index_cut, ""),
        (_index_deleted, ""),
    ],
)
async def test_lost_or_replaced(
    guest: Guest,
    golden: Golden,
    digest: str,
    part: str,
    betray: Callable[[Golden], AbstractContextManager[None]],
    reason: str,
) -> None:
    """The file itself lives on in QEMU's hands, and what is lost of its index can be made again: all is served."""
    before = await discard(guest)
    held = guest.heard("VM_HELD")
    with betray(golden):
        if reason:
            await is_refused(guest, reason)
        assert await guest.run(_PART) == part
        await kill_pager(guest)
        left = len(Dependants(guest.qemu_pid, _MEMORY).pfns)
        assert 3_000 < left < len(before.pfns)
        assert await guest.tree_digest() == digest
        assert len(Dependants(guest.qemu_pid, _MEMORY).pfns) < left - 2_000
        assert guest.heard("VM_HELD") == held
    await is_trusted(guest)
    assert await guest.complaints() == []


@asynccontextmanager
async def writer(path: Path) -> AsyncIterator[int]:
    """A process that has a file open for writing, and writes nothing."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", _WRITER, str(path), stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdin is not None
    try:
        async with asyncio.timeout(STEP_SECONDS):
            assert await process.stdout.readline() == b"open\n"
        yield process.pid
    finally:
        process.stdin.close()
        await process.wait()


async def test_a_writer_is_noticed_and_let_in(guest: Guest, golden: Golden, digest: str) -> None:
    await discard(guest)
    began = time.monotonic()
    async with writer(golden.root) as pid:
        # Not after the 45 s that the kernel would have it wait.
        assert time.monotonic() - began < 30
        await is_refused(guest, rf"layer {golden.root}: process {pid} \(.*\) has it open for writing")
        told = [data for name, data in guest.events if name == "LAYER_WRITER"]
        assert told[-1]["layer"] == str(golden.root)
        # Another VM does not even start on it.
        with pytest.raises(RefusedError, match=rf"image {golden.root}: process {pid} .* open for writing"):
            await guest.fleet.up(guest.vm.config.model_copy(update={"name": "second"}), print)
    await is_trusted(guest)
    assert guest.vm.state is VmState.RUNNING
    assert (await guest.vm.reclaim(BOTH)).epochs
    assert await guest.tree_digest() == digest


async def test_qemus_own_locks_keep_other_qemus_out(guest: Guest, golden: Golden) -> None:
    done = await asyncio.to_thread(
        subprocess.run,
        ["qemu-io", "-f", "raw", "-c", "write 0 4096", str(golden.root)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert 'Failed to get "write" lock' in done.stderr
    await is_trusted(guest)


async def test_down_of_a_held_vm_is_quick(guest: Guest, golden: Golden, digest: str) -> None:
    """The last one: nothing is left of the guest."""
    before = await discard(guest)
    blocks = before.some_blocks(8)
    reading = asyncio.create_task(guest.vm.execute(["sh", "-c", TREE], timeout=600))
    await golden.alter(blocks)
    try:
        await is_held(guest, golden, before.on(blocks), "has changed")
        async with asyncio.timeout(_AT_ONCE):
            assert await guest.fleet.down(guest.vm.name) == "SIGKILL"
        with pytest.raises(PeerLost):
            async with asyncio.timeout(_AT_ONCE):
                await reading
    finally:
        await golden.repair(blocks)
