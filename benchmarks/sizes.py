"""Guests of 0.5 to 16 GiB: what an epoch costs a page, how long pages stay protected, how long the guest's writes take.

A program in the guest times its own writes, of two kinds that meet an epoch: to memory it has just been given (UNUSED
until then) and to clean files (VOLATILE until then). First nothing else goes on, then epochs back to back.
"""

from __future__ import annotations

import asyncio
import io
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Picture

from benchmarks.figure import FOLDER, Figure, show
from hva_host.agent.fleet import Fleet
from hva_host.agent.model import EpochStats
from hva_host.agent.vm import Vm
from hvaqemu.config import VmConfig
from hvaqemu.reclaim_config import DEFAULT_STATES
from hvaqemu.units import GiB, MiB

SIZES = (512 * MiB, GiB, 4 * GiB, 16 * GiB)
#: Of a guest's memory that is used and freed again, and what it is at most.
_USED, _USED_MAX = 0.4, 4 * GiB
_QUIET_SECONDS, _BUSY_SECONDS, _EVERY_SECONDS = 4, 10, 0.2
_BOOT_SECONDS = 240.0
_STEP_SECONDS = 300.0

_FILL = """
mount -t tmpfs -o size={bytes} tmpfs /mnt && dd if=/dev/urandom of=/mnt/seed bs=1M count=32 2>/dev/null
for i in $(seq {files}); do cat /mnt/seed >/mnt/$i; done
find /usr -xdev -type f -print0 | xargs -0 cat | md5sum; umount /mnt
"""
_WRITER = """
import json, mmap, os, random, sys, time
clock, until = time.perf_counter_ns, time.monotonic() + float(sys.argv[1])
path = "/root/written"
file = os.open(path, os.O_RDWR | os.O_CREAT)
os.write(file, os.urandom(1 << 20) * 16)
os.fsync(file)
times, page = [], os.urandom(4096)
while time.monotonic() < until:
    with mmap.mmap(-1, 1 << 18) as fresh:
        for at in range(0, 1 << 18, 4096):
            began = clock()
            fresh[at] = 1
            times.append(clock() - began)
    for _ in range(16):
        began = clock()
        os.pwrite(file, page, random.randrange(4096) << 12)
        times.append(clock() - began)
    os.fsync(file)
os.close(file)
os.unlink(path)
times.sort()
share = lambda part: times[min(int(len(times) * part), len(times) - 1)] / 1e3
shares = {"median": 0.5, "p99": 0.99, "p999": 0.999, "longest": 1}
print(json.dumps({"count": len(times), **{name: share(part) for name, part in shares.items()}}))
"""


@dataclass(frozen=True)
class Measured:
    """One size. ``quiet`` and ``busy``: the guest's own writes without and beside epochs, in microseconds."""

    size: int
    epoch: EpochStats
    quiet: dict[str, float]
    busy: dict[str, float]
    protected_s: float
    epochs: int

    @property
    def pager_us(self) -> float:
        """Microseconds of the pager a candidate."""
        seconds = self.epoch.seconds
        return (seconds.protect + seconds.prove + seconds.discard) / self.epoch.candidates * 1e6

    @property
    def guest_us(self) -> float:
        """Microseconds a page of RAM that the guest's scans took: one report, two confirmations."""
        return (self.epoch.seconds.scan + self.epoch.seconds.confirm) / (self.size >> 12) * 1e6


def main() -> None:
    """Boot a guest of each size and take its figures."""
    measured = asyncio.run(_main())
    small, large = measured[0], measured[-1]

    def each_size(what: Callable[[Measured], str]) -> str:
        return "; ".join(f"{each.size / GiB:g} GiB: {what(each)}" for each in measured)

    between = f"{large.size / GiB:g} GiB / {small.size / GiB:g} GiB"
    figures = [
        Figure(f"pager, µs a candidate, {between}", large.pager_us / small.pager_us, "<= 1.5", "1",
               each_size(lambda it: f"{it.pager_us:.2f}, {it.epoch.candidates:,} in {it.epoch.slices} slices")),
        Figure(f"scans of the guest, µs a page of RAM, {between}", large.guest_us / small.guest_us, "<= 1.5", "1",
               each_size(lambda it: f"{it.guest_us:.2f}")),
        Figure("pages stayed protected at most, s", max(each.protected_s for each in measured), "<= 5", "",
               each_size(lambda it: f"{it.protected_s:.2f} in {it.epochs} epochs")),
    ]  # fmt: skip
    for each in measured:
        compared = (f"{name} {each.busy[name]:.0f} / {each.quiet[name]:.0f}" for name in ("median", "p99", "p999"))
        figures.append(Figure(f"{each.size / GiB:g} GiB: the guest's longest write beside epochs, ms",
                              each.busy["longest"] / 1e3, "", f"{each.quiet['longest'] / 1e3:.3g}",
                              f"µs, beside / without: {', '.join(compared)}; of {each.busy['count']:,}"))  # fmt: skip
    show("sizes", figures)
    (FOLDER / "sizes.png").write_bytes(_draw(measured))


async def _main() -> list[Measured]:
    found = []
    for size in SIZES:
        with tempfile.TemporaryDirectory(prefix="hvabench") as runtime:
            fleet = Fleet(Path(runtime), embedded=True)
            try:
                config = VmConfig(name="bench", memory=size, cpus=2, allow_exec=True, boot_timeout=_BOOT_SECONDS)
                found.append(await _measure(await fleet.up(config, lambda _line: None), size))
            finally:
                await fleet.close()
    return found


async def _measure(vm: Vm, size: int) -> Measured:
    used = int(min(size * _USED, _USED_MAX))
    await _run(vm, "sh", _FILL.format(bytes=used + 64 * MiB, files=used // (32 * MiB) - 1))
    quiet = await _writes(vm, _QUIET_SECONDS)
    # What is measured is one that has something to do; the size of slices is found by it, too.
    epoch = (await vm.reclaim(DEFAULT_STATES, epochs=1)).epochs[0]
    vm.start_reclaiming(DEFAULT_STATES, _EVERY_SECONDS)
    busy = await _writes(vm, _BUSY_SECONDS)
    done = (await vm.stop_reclaiming()).epochs
    protected = max(each.protected_s for each in (epoch, *done))
    return Measured(size, epoch, quiet, busy, protected, 1 + len(done))


async def _writes(vm: Vm, seconds: int) -> dict[str, float]:
    answer: dict[str, float] = json.loads(await _run(vm, "python3", _WRITER, str(seconds)))
    return answer


async def _run(vm: Vm, interpreter: str, program: str, *arguments: str) -> bytes:
    argv = [interpreter, *(("-",) if interpreter == "python3" else ("-s",)), *arguments]
    done = await vm.execute(argv, timeout=_STEP_SECONDS, stdin=program.encode())
    assert done.ok, done
    return done.stdout


def _draw(measured: list[Measured]) -> bytes:
    """The costs and the waits over the guests' sizes, as PNG."""

    picture = Picture(figsize=(10, 4), dpi=130, layout="constrained", facecolor="white")
    FigureCanvasAgg(picture)
    cost, waits = picture.subplots(1, 2)
    sizes = [each.size / GiB for each in measured]
    cost.plot(sizes, [each.pager_us for each in measured], "o-", color="#0b5394", label="pager, a candidate")
    cost.plot(sizes, [each.guest_us for each in measured], "s--", color="#b3372f", label="guest's scans, a page of RAM")
    cost.set(title="What an epoch costs", ylabel="µs a page", ylim=(0, None))
    for name, style in (("median", "o"), ("p99", "s"), ("p999", "^"), ("longest", "D")):
        (line,) = waits.plot(sizes, [each.busy[name] for each in measured], f"{style}-", label=name)
        waits.plot(sizes, [each.quiet[name] for each in measured], f"{style}:", color=line.get_color(), alpha=0.6)
    waits.set(title="The guest's writes beside epochs (dotted: without)", ylabel="µs", yscale="log")
    waits.set_ylim(top=8 * max(each.busy["longest"] for each in measured))
    for axes in (cost, waits):
        axes.set(xlabel="guest memory, GiB", xscale="log")
        axes.set_xticks(sizes, [f"{size:g}" for size in sizes])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, loc="upper center", ncols=4 if axes is waits else 1)
    buffer = io.BytesIO()
    picture.savefig(buffer, format="png")
    return buffer.getvalue()
