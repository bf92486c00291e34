"""Where the guest's RAM is, and how much of it is free: /proc/iomem, memory blocks, /proc/meminfo, memory pressure."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from typing import NamedTuple

from hvaqemu.pages import PAGE_SIZE
from hvaqemu.protocol import RANGES_MAX, UNKNOWN_U32, UNKNOWN_U64

#: (start pfn, pages), ascending, disjoint.
Ranges = tuple[tuple[int, int], ...]

_TOP_LEVEL_RAM = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) : System RAM", re.MULTILINE)
_ZONE = re.compile(
    r"^Node \d+, zone(?:(?!^Node ).)*?^\s*spanned\s+(\d+)(?:(?!^Node ).)*?^\s*start_pfn:\s+(\d+)", re.M | re.S
)


class Memory(NamedTuple):
    """Bytes."""

    total: int
    free: int
    available: int


def read_bytes(path: str, limit: int = 1 << 20) -> bytes:
    """The first ``limit`` bytes of a file of /proc or /sys; b"" where it cannot be read."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return b""
    found = bytearray()
    try:
        while len(found) < limit:
            piece = os.read(descriptor, limit - len(found))
            if not piece:
                break
            found += piece
    except OSError:
        return b""
    finally:
        os.close(descriptor)
    return bytes(found)


def read_text(path: str) -> str:
    """The same as text; "" where it cannot be read."""
    return read_bytes(path).decode("utf-8", "replace")


def ranges_of_iomem(text: str) -> Ranges:
    """The "System RAM" ranges of /proc/iomem. Without privilege it shows zeros instead of addresses: then none."""
    found = [(int(low, 16), int(high, 16) + 1) for low, high in _TOP_LEVEL_RAM.findall(text)]
    return normalised((-(-low // PAGE_SIZE), high // PAGE_SIZE) for low, high in found if high > 1)


def ranges_of_blocks(root: str) -> Ranges:
    """The online memory blocks below ``root`` (/sys/devices/system/memory)."""
    size = read_text(f"{root}/block_size_bytes").strip()
    if not size:
        return ()
    pages = int(size, 16) // PAGE_SIZE
    blocks = []
    for entry in os.scandir(root):
        index = read_text(f"{entry.path}/phys_index").strip()
        if index and read_text(f"{entry.path}/state").strip() == "online":
            blocks.append((int(index, 16) * pages, (int(index, 16) + 1) * pages))
    return normalised(blocks)


def ranges_of_zones(text: str) -> Ranges:
    """The zones of /proc/zoneinfo; they may span holes, whose pages then show up as STABLE."""
    zones = [(int(start), int(start) + int(spanned)) for spanned, start in _ZONE.findall(text)]
    return normalised(zones)


def normalised(bounds: Iterable[tuple[int, int]]) -> Ranges:
    """Half-open pfn intervals as ascending disjoint ranges, neighbours joined, at most ``RANGES_MAX`` of them."""
    merged: list[list[int]] = []
    for start, stop in sorted(bounds):
        if start >= stop:
            continue
        if merged and start <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], stop)
        else:
            merged.append([start, stop])
    return tuple((start, stop - start) for start, stop in merged[:RANGES_MAX])


def part_of(ranges: Ranges, start: int, stop: int) -> Ranges:
    """What of ``ranges`` lies in pfns [``start``, ``stop``)."""
    return normalised((max(first, start), min(first + pages, stop)) for first, pages in ranges)


def memory_ranges(iomem: str = "/proc/iomem") -> Ranges:
    """The guest's RAM by the best source that answers; () where none does."""
    return (
        ranges_of_iomem(read_text(iomem))
        or ranges_of_blocks("/sys/devices/system/memory")
        or ranges_of_zones(read_text("/proc/zoneinfo"))
    )


def read_memory() -> Memory:
    """What /proc/meminfo says now; 0 where it does not say."""
    figures = {}
    for line in read_text("/proc/meminfo").splitlines():
        name, _, rest = line.partition(":")
        if name in ("MemTotal", "MemFree", "MemAvailable"):
            figures[name] = int(rest.split()[0]) * 1024
    return Memory(figures.get("MemTotal", 0), figures.get("MemFree", 0), figures.get("MemAvailable", 0))


def read_pressure() -> tuple[int, int]:
    """Memory pressure "some avg10" and "full avg10", hundredths of a percent; ``UNKNOWN_U32`` where the kernel has no
    PSI."""
    text = read_text("/proc/pressure/memory")
    return pressure_of(text, "some"), pressure_of(text, "full")


def pressure_of(text: str, kind: str) -> int:
    """One of them from the text of /proc/pressure/memory."""
    match = re.search(rf"^{kind} avg10=(\d+)\.(\d\d)", text, re.MULTILINE)
    return int(match[1]) * 100 + int(match[2]) if match else UNKNOWN_U32


def read_workingset_refaults() -> int:
    """Pages that were read again soon after their eviction, since boot; ``UNKNOWN_U64`` where the kernel does not say.

    Source: mm/workingset.c; one number before Linux 5.9, one for files and one for swap since.
    """
    found = re.findall(r"^workingset_refault\w* (\d+)$", read_text("/proc/vmstat"), re.MULTILINE)
    return sum(map(int, found)) if found else UNKNOWN_U64


def read_uptime_ms() -> int:
    """Milliseconds since the guest's kernel started."""
    text = read_text("/proc/uptime")
    return int(float(text.split()[0]) * 1000) if text else 0
