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
from hva_host.pager.sources import Sources
from hvaqemu.pages import Run

PAGE = 4096
PAGES = 64
ZERO = bytes(PAGE)


class Vcpu:
    """A child in QEMU's place (``vcpu.py``): it has RAM, and touches pages of it when told."""

    def __init__(self, pages: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("vcpu.py")), str(pages)],
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

    def __init__(self, pages: int = PAGES) -> None:
        self.child = Vcpu(pages)
        self.address = self.child.address
        self.pidfd = os.pidfd_open(self.child.pid)
        self.ram = attach(self.child.pid, self.pidfd, Sources(self.child.pid, self.pidfd))
        self.fetcher = Fetcher()
        self.prover = Prover(self.ram)
        self.epoch: Epoch | None = None
        self.preserver = Preserver(self.ram)
        self.preserver.limit = self.ram.pages * PAGE
        self.refaults = Refaults(self.ram, self._leave, self.fetcher, self.preserver.coldness.came_back)

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
        self, members: dict[int, Member], seconds: float = 5.0, part: Run | None = None, *, drain: bool = False
    ) -> Epoch:
        """An epoch over some pages, all of them in ``part`` if that is given; a test iterates its steps."""
        part = part or Run(0, self.ram.pages)
        wanted = np.zeros(part.pages, dtype=np.uint8)
        for pfn, member in members.items():
            wanted[pfn - part.start] = member
        self.preserver.round += 1
        self.epoch = Epoch(self.ram, self.prover, wanted, seconds, part.start, self.preserver, drain=drain)
        return self.epoch

    def confirm_all(self, epoch: Epoch) -> None:
        """Both scans find every page free."""
        free = np.ones(epoch.pages, dtype=np.bool_)
        assert epoch.confirm(epoch.identifier, 1, free)
        assert epoch.confirm(epoch.identifier, 2, free)

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


def write_layer(folder: Path, content: bytes, name: str = "golden.raw") -> tuple[Path, Path]:
    """A layer and its index, as files."""
    path, index = folder / name, folder / f"{name}.idx"
    path.write_bytes(content)
    build_index(path, index)
    return path, index


def make_layer(folder: Path, blocks: list[bytes], name: str = "golden.raw") -> Layer:
    """A layer of these blocks, indexed and open."""
    return open_layer(*write_layer(folder, b"".join(blocks), name))
