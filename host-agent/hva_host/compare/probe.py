"""Free page reporting, which nobody tells what to do: whether it does anything on a guest, and when it has done it.

Memory that a guest frees must leave the backing by itself. Linux promises that of all pages of an idle system within
about 30 seconds (Documentation/mm/free_page_reporting.rst).
"""

from __future__ import annotations

import asyncio
import time

from hva_host.compare.model import Probe
from hva_host.scenario.seam import PlayedVm
from hvaqemu.errors import HvaError
from hvaqemu.qemu.logs import one_line, printable
from hvaqemu.units import MiB, format_size

_SIZE = 128 * MiB
_SHARE = 4
#: Of what was freed this much must come back: pages beside may come and go meanwhile.
_BACK = 0.5
#: Twice what Linux promises.
_WAIT_SECONDS = 60.0
#: It reports every two seconds (mm/page_reporting.c): where so little goes in three of those, it has done what it can.
_REST_SECONDS = 6.0
_REST_BYTES = MiB
_LOOK_SECONDS = 0.5
_COMMAND_SECONDS = 60.0
_PROGRAM = "len(b'1' * {size})"


async def probe(vm: PlayedVm, memory: int, wait: float = _WAIT_SECONDS) -> Probe:
    """Have the guest use and free memory, and see whether it is given back.

    :param memory: the guest's, in bytes.
    :param wait: seconds it may take.
    """
    size = min(_SIZE, memory // _SHARE)
    try:
        command = f'python3 -c "{_PROGRAM.format(size=size)}"'
        done = await vm.execute(["/bin/sh", "-c", command], timeout=_COMMAND_SECONDS)
        if not done.ok:
            said = one_line(printable(done.stderr.decode(errors="replace")).strip())
            return Probe(works=None, why=f"the guest can not use {format_size(size)} any more: {said}")
        most = (await vm.sample()).backing_bytes
        until = time.monotonic() + wait
        while True:
            back = most - (await vm.sample()).backing_bytes
            if back >= size * _BACK:
                return Probe(works=True, why=f"of {format_size(size)} freed, {format_size(back)} came back")
            if time.monotonic() > until:
                break
            await asyncio.sleep(_LOOK_SECONDS)
    except HvaError as error:
        return Probe(works=None, why=f"could not be tried: {one_line(printable(str(error)))}")
    came = f"only {format_size(back)}" if back >= MiB else "no page"
    return Probe(works=False, why=f"{came} of {format_size(size)} that it freed came back in {wait:g} s")


async def come_to_rest(vm: PlayedVm, most: float = _WAIT_SECONDS) -> None:
    """Wait until the backing does not fall any more, at most so many seconds.

    :raise HvaError: the VM can not be asked.
    """
    began = rested = time.monotonic()
    least = (await vm.sample()).backing_bytes
    while (now := time.monotonic()) - rested < _REST_SECONDS and now - began < most:
        await asyncio.sleep(_LOOK_SECONDS)
        backing = (await vm.sample()).backing_bytes
        if least - backing >= _REST_BYTES:
            least, rested = backing, time.monotonic()
