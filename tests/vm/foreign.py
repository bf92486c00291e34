"""A guest whose QEMU others operate too, while epochs run one after the other and the guest verifies what it does."""

from __future__ import annotations

import asyncio
import hashlib
import shutil
import struct
import subprocess
import tempfile
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from qemu.qmp import ConnectError, QMPClient, Runstate

from hvaqemu.errors import HvaError
from hvaqemu.units import MiB
from tests.vm.harness import BOTH, STEP_SECONDS, Guest, running_guest, until
from tests.vm.programs import PYTHON

MEMORY = 256 * MiB
#: The one that is under way, and one that was begun since.
_SOME_EPOCHS = 2
#: At the most, where it is not told to end before: a guest with little memory left does nothing else meanwhile.
_CHURN_SECONDS = 12
_CHURN = f"setsid sh -c '{PYTHON} churn {_CHURN_SECONDS} >churn.said 2>&1; echo $? >churn.status' &"


class Foreign(Guest):
    """A guest whose QEMU has a second monitor, for whoever has nothing to do with hvaqemu."""

    other: QMPClient
    folder: Path
    #: The checksum of many files, before anything was done.
    tree: str

    async def tell(self, command: str, **arguments: object) -> Any:
        """A command through hvaqemu, as an operator gives it."""
        return await self.vm.monitor(command, {key.replace("_", "-"): value for key, value in arguments.items()}, 60.0)

    async def epochs(self, count: int = _SOME_EPOCHS) -> None:
        """Wait until so many more epochs have ended."""
        seen = self.heard("EPOCH")
        await until(lambda: self.heard("EPOCH") >= seen + count, STEP_SECONDS, f"{count} epochs")

    async def job(self, name: str) -> None:
        """Wait for a job of QEMU's, and see that it did well."""
        async with asyncio.timeout(STEP_SECONDS):
            while True:
                (job,) = [job for job in await self.tell("query-jobs") if job["id"] == name]
                if job["status"] == "concluded":
                    break
                await asyncio.sleep(0.05)
        assert "error" not in job, job
        await self.tell("job-dismiss", id=name)

    def reasons(self) -> list[str]:
        """What reclaim was refused for, in order."""
        return [data["reason"] for name, data in self.events if name == "RECLAIM_REFUSED"]

    async def churn(self) -> None:
        """Have the guest churn in the background, for a while: this waits for nothing."""
        await self.run(f"cd /run; rm -f churn.status churn.end; {_CHURN}")

    async def churned(self) -> None:
        """End the churn; everything it looked at must have been right."""
        await self.run("touch /run/churn.end")
        async with asyncio.timeout(STEP_SECONDS):
            while True:
                try:
                    if (await self.run("cat /run/churn.status 2>/dev/null || true")).strip():
                        break
                except HvaError:
                    # The guest agent may be greeting us, having found itself in another time.
                    pass
                await asyncio.sleep(0.2)
        said = await self.run("cat /run/churn.said /run/churn.status")
        assert "mismatch" not in said, said
        assert said.split()[-1] == "0", said


@asynccontextmanager
async def running_foreign() -> AsyncIterator[Foreign]:
    """Such a guest, with the churn's checksums taken."""
    folder = Path(tempfile.mkdtemp(prefix="hvf-", dir="/tmp"))
    monitor = folder / "other.sock"
    second = ("-qmp", f"unix:{monitor},server=on,wait=off")
    other = QMPClient("other")
    try:
        async with running_guest("foreign", memory=MEMORY, qemu_args=second) as plain:
            found = Foreign(plain.fleet, plain.vm, plain.events)
            found.folder, found.other = folder, other
            await other.connect(str(monitor))
            await remember(found)
            found.tree = await found.tree_digest()
            try:
                yield found
            finally:
                await other.disconnect()
    finally:
        shutil.rmtree(folder)


async def remember(guest: Foreign) -> None:
    """Put the churn into the guest, and have it take the checksums it will compare with."""
    await guest.program("churn", "remember")


@asynccontextmanager
async def continuous_epochs(guest: Foreign) -> AsyncIterator[None]:
    """Epochs without a pause under a guest that churns, some before and after; afterwards all of it must be right."""
    await guest.churn()
    guest.vm.start_reclaiming(BOTH, 0.0)
    try:
        await guest.epochs()
        yield
        await guest.epochs()
        await guest.churned()
    finally:
        result = await guest.vm.stop_reclaiming()
    assert result.discarded > 0
    assert await guest.complaints() == []
    assert await guest.tree_digest() == guest.tree
    assert (await guest.vm.status()).reclaim_refused == ""


async def balloon_is(client: QMPClient, size: int) -> None:
    """Wait until the guest has so many bytes; QEMU's events of it go to the other monitor too, and are rate-limited."""
    async with asyncio.timeout(STEP_SECONDS):
        while True:
            answer: Mapping[str, Any] = await client.execute("query-balloon")  # type: ignore[assignment]
            if answer["actual"] == size:
                return
            await asyncio.sleep(0.1)


async def saved(guest: Foreign) -> str:
    """A checksum of all of RAM, as ``pmemsave`` reads it."""
    path = guest.folder / "ram"
    await guest.tell("pmemsave", val=0, size=MEMORY, filename=str(path))
    return checksum(path)


def checksum(path: Path) -> str:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    path.unlink()
    return found


def memory_of_dump(path: Path) -> str:
    """A checksum of the memory in an ELF core of a big-endian guest (elf(5): e_phoff, e_phnum; p_type, p_offset, …)."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        header = file.read(64)
        assert header[:6] == b"\x7fELF\x02\x02"
        (offset,), (count,) = struct.unpack_from(">Q", header, 32), struct.unpack_from(">H", header, 56)
        end = 0
        for number in range(count):
            file.seek(offset + 56 * number)
            kind, _, at, _, address, size = struct.unpack(">IIQQQQ", file.read(40))
            if kind == 1:
                assert address == end, "all of RAM, in order"
                end = address + size
                file.seek(at)
                digest.update(file.read(size))
    assert end == MEMORY
    return digest.hexdigest()


async def receive(path: Path, into: Path) -> None:
    """Write what one connection to a socket brings to a file."""
    done = asyncio.Event()

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with into.open("wb") as file:
            while data := await reader.read(1 << 20):
                file.write(data)
        writer.close()
        done.set()

    async with await asyncio.start_unix_server(copy, path), asyncio.timeout(STEP_SECONDS):
        await done.wait()
    path.unlink(missing_ok=True)


async def arrived(guest: Foreign, stream: Path) -> str:
    """A checksum of the RAM of a QEMU without us that took in a migration."""
    monitor = guest.folder / "there.sock"
    words = Path(f"/proc/{guest.qemu_pid}/cmdline").read_bytes().decode().split("\0")[:-1]
    argv = words[: words.index("-sandbox")]
    for at, word in enumerate(argv):
        if word.startswith("socket,id=qmp,"):
            argv[at] = f"socket,id=qmp,path={monitor},server=on,wait=off"
        elif word.startswith(("socket,id=agent,", "file,id=console,")):
            argv[at] = f"null,id={word.split(',')[1].removeprefix('id=')}"
    with subprocess.Popen([*argv, "-incoming", f"exec:cat {stream}"]) as qemu:  # noqa: ASYNC220
        client = QMPClient("there")
        try:
            async with asyncio.timeout(STEP_SECONDS):
                while client.runstate is not Runstate.RUNNING:
                    # It makes its socket, and listens a moment later.
                    with suppress(ConnectError):
                        await client.connect(str(monitor))
                    await asyncio.sleep(0.05)
            async with asyncio.timeout(STEP_SECONDS):
                status = await after_arrival(client)
            assert status in ("paused", "prelaunch", "postmigrate"), status
            path = guest.folder / "there"
            await client.execute("pmemsave", {"val": 0, "size": MEMORY, "filename": str(path)})
            return checksum(path)
        finally:
            qemu.kill()
            if client.runstate.name != "IDLE":
                with suppress(EOFError, OSError):
                    await client.disconnect()
            monitor.unlink(missing_ok=True)


async def after_arrival(client: QMPClient) -> str:
    """The state of a QEMU once its guest has arrived."""
    while True:
        answer: Mapping[str, Any] = await client.execute("query-status")  # type: ignore[assignment]
        if answer["status"] != "inmigrate":
            return str(answer["status"])
        await asyncio.sleep(0.05)
