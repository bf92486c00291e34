"""What the kernel tests share: a child in QEMU's place, a guest without QEMU, and golden layers."""

from __future__ import annotations

import os
import random
import select
import subprocess
import sys
import time
import zlib
from pathlib import Path
from typing import Self

import numpy as np

from hva_host.memory.index import build_index
from hva_host.memory.layers import Layer, open_layer
from hva_host.pager.attach import attach
from hva_host.pager.epoch import Epoch
from hva_host.pager.fetch import Fetcher
from hva_host.pager.membership import Member
from hva_host.pager.preserve import Preserver
from hva_host.pager.process_files import descriptors
from hva_host.pager.prove import Prover
from hva_host.pager.refaults import Refaults
from hva_host.pager.sampling import Samples, Sampling
from hva_host.pager.sources import Sources
from hvaqemu.pages import Run

PAGE = 4096
PAGES = 64
ZERO = bytes(PAGE)


class Vcpu:
    """A child in QEMU's place (``vcpu.py``): it has RAM, and touches pages of it when told.

    :param folder: its store is a file there; None: in memory.
    """

    def __init__(self, pages: int, folder: Path | None = None) -> None:
        program = [sys.executable, str(Path(__file__).with_name("vcpu.py")), str(pages)]
        self._process = subprocess.Popen(
            program if folder is None else [*program, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
        self.pid = self._process.pid
        #: Where its RAM is mapped.
        self.address = int(self.reply().split()[0])

    def kill(self) -> None:
        """End it, even where it waits in a fault."""
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        """Kill it, and hear nothing more of it."""
        self.kill()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()

    def fill(self, data: bytes) -> None:
        """Put bytes at the start of its RAM through the memfd, as a guest that has them."""
        ram = next(fd for fd, link in descriptors(self.pid).items() if "memory-backend" in link)
        with Path(f"/proc/{self.pid}/fd/{ram}").open("r+b") as file:
            file.write(data)

    def send(self, line: str) -> None:
        """Tell it to touch something; it may wait in a fault then."""
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")

    def answered(self, timeout: float = 0.0) -> bool:
        """Has it answered within ``timeout`` seconds?"""
        assert self._process.stdout is not None
        return bool(select.select([self._process.stdout], [], [], timeout)[0])

    def reply(self) -> str:
        """What it answers, however long that takes."""
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def say(self, line: str) -> str:
        """Tell it to touch something, which somebody else lets it do; what it answers."""
        self.send(line)
        return self.reply()


class Guest:
    """A child with RAM, and a pager in this process that answers only when a test says so."""

    def __init__(self, pages: int = PAGES, folder: Path | None = None) -> None:
        self.child = Vcpu(pages, folder)
        self.address = self.child.address
        self.pidfd = os.pidfd_open(self.child.pid)
        self.ram = attach(self.child.pid, self.pidfd, Sources(self.child.pid, self.pidfd))
        self.fetcher = Fetcher()
        self.prover = Prover(self.ram)
        self.epoch: Epoch | None = None
        self.preserver = Preserver(self.ram)
        self.preserver.limit = self.ram.pages * PAGE
        self.samples = Samples(self.ram.pages)
        self.round = 0
        self.refaults = Refaults(self.ram, self._leave, self.fetcher, self.samples.came_back)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.child.close()
        self.fetcher.close()
        self.ram.uffd.close()
        self.ram.backing.close()
        os.close(self.pidfd)
        os.close(self.ram.ledger.fd)

    def _leave(self, start: int, stop: int) -> None:
        if self.epoch is not None:
            self.epoch.leave(start, stop)

    def send(self, line: str) -> None:
        """Tell the vCPU to touch something; it may wait in a fault then."""
        self.child.send(line)

    def answered(self, timeout: float = 0.0) -> bool:
        """Has the vCPU answered within ``timeout`` seconds?"""
        return self.child.answered(timeout)

    def serve(self) -> int:
        """Answer the faults there are now; answers how many."""
        faults = self.ram.uffd.read()
        self.refaults.answer(faults, time.monotonic())
        self.refaults.read_ahead()
        for result in self.fetcher.results():
            self.refaults.fetched(result)
        return len(faults)

    def reply(self) -> str:
        """Answer faults until the vCPU is through, and what it said."""
        deadline = time.monotonic() + 10
        while not self.answered(0.001):
            self.serve()
            assert time.monotonic() < deadline, "the vCPU still waits"
        return self.child.reply()

    def write(self, pfn: int, text: str) -> None:
        """Have the vCPU write, serving its faults."""
        self.send(f"w {pfn} {text}")
        assert self.reply() == "ok"

    def checksum(self, pfn: int) -> int:
        """CRC-32 of the page as the vCPU reads it, serving its faults."""
        self.send(f"r {pfn}")
        return int(self.reply().split()[1])

    def fill(self, pfn: int, data: bytes) -> None:
        """Put a page into RAM through the memfd, as a guest that has it."""
        os.pwrite(self.ram.backing.fd, data, pfn * PAGE)

    def begin(
        self,
        members: dict[int, Member],
        seconds: float = 5.0,
        part: Run | None = None,
        *,
        drain: bool = False,
        sampled: bool = False,
        most: int | None = None,
    ) -> Epoch:
        """An epoch over some pages, all of them in ``part`` if that is given; a test iterates its steps."""
        part = part or Run(0, self.ram.pages)
        wanted = np.zeros(part.pages, dtype=np.uint8)
        for pfn, member in members.items():
            wanted[pfn - part.start] = member
        self.round += 1
        sampling = Sampling(self.samples, self.round, copies=sampled, most=most)
        self.epoch = Epoch(self.ram, self.prover, wanted, seconds, part.start, self.preserver, sampling, drain=drain)
        return self.epoch

    def confirm_all(self, epoch: Epoch) -> None:
        """Both scans find every page free."""
        free = np.ones(epoch.pages, dtype=np.bool_)
        assert epoch.confirm(epoch.identifier, 1, free)
        assert epoch.confirm(epoch.identifier, 2, free)

    def stored(self) -> int:
        """What the store occupies, once its file has taken what was asked of it."""
        self.ram.store.begin(self.preserver.limit)
        deadline = time.monotonic() + 10
        while not self.ram.store.written(self.ram.store.asked):
            assert time.monotonic() < deadline, "the store's file takes no more"
        return self.ram.store.used_bytes()

    def evict_store(self) -> None:
        """Have the host's page cache hold nothing of a store that is a file."""
        self.stored()
        evict(self.ram.store.fd)

    def run(self, epoch: Epoch, *, confirm: bool = True) -> None:
        """Run an epoch to its end, confirming once it asks."""
        for _ in epoch.steps():
            if confirm and epoch.identifier and epoch.wants_confirmation() and not epoch._confirmed:
                self.confirm_all(epoch)


def crc(data: bytes | bytearray) -> int:
    """As the vCPU computes it."""
    return zlib.crc32(data)


def block(seed: int) -> bytes:
    """4 KiB of reproducible noise."""
    return random.Random(seed).randbytes(PAGE)


def evict(fd: int) -> None:
    """Have the host's page cache hold nothing of a file."""
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


def soft(pfn: int) -> bytes:
    """A page that compresses, unlike any other."""
    return block(pfn)[:700] + b"soft" * 849


def write_layer(folder: Path, content: bytes, name: str = "golden.raw") -> tuple[Path, Path]:
    """A layer and its index, as files."""
    path, index = folder / name, folder / f"{name}.idx"
    path.write_bytes(content)
    build_index(path, index)
    return path, index


def make_layer(folder: Path, blocks: list[bytes], name: str = "golden.raw") -> Layer:
    """A layer of these blocks, indexed and open."""
    return open_layer(*write_layer(folder, b"".join(blocks), name))
