"""The host of the experiment: a process that lives in the limited control group, with all it starts.

Orders are lines of JSON on standard input, ``{"up": N}`` or ``{"look": true}``; each is answered by one on standard
output. It ends, with its guests, when standard input does, whatever goes on.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.density.model import FIRST_PORT, MEMORY
from hva_host.agent import accounts
from hva_host.agent.chores import Chores
from hva_host.agent.fleet import Fleet
from hva_host.agent.vm import Vm
from hva_host.compare.balloon import Bounds, reserve_share
from hva_host.compare.balloon_keeper import BalloonKeeper
from hva_host.compare.method import Method
from hva_host.compare.watch import GuestWatch
from hva_host.policy.samples import Limits
from hvaqemu.config import BalloonConfig, VmConfig
from hvaqemu.errors import HvaError
from hvaqemu.image_config import ImageConfig
from hvaqemu.network_config import UserNetwork
from hvaqemu.reclaim_config import ReclaimConfig, ReclaimMode, ReclaimState, changed
from hvaqemu.units import MiB

#: What every method leaves a guest at least.
_LEAST = 16 * MiB
#: Of what a guest uses, that it may want back in a minute: what memory is dear for is worth more than the default.
_BUDGET = "5%/min"
#: For translated code: half of the default makes this service no slower (docs/operations.md).
_TRANSLATION = 16 * MiB
#: What a balloon leaves available to a guest at least, of what it has: these guests have nowhere to swap to.
_RESERVE_LEAST = 0.05
_SERVER = Path(__file__).parent.parent.parent / "examples/service/server.py"
_SERVE = "python3 -B /opt/service.py --start"
#: A guest that has been up for a while has read a lot.
_FILL = "find /usr -xdev -type f -print0 | xargs -0 cat >/dev/null"
#: Of several processes too many, a guest is the one to go, not what takes care of all.
_OOM_SCORE = "900"


def config(number: int, method: Method) -> VmConfig:
    """The guest with that number."""
    reclaim = ReclaimConfig(mode=ReclaimMode.OFF, min_resident=_LEAST)
    if method is Method.HVA:
        reclaim = changed(
            ReclaimConfig(states=tuple(ReclaimState), min_resident=_LEAST),
            [f"mode={ReclaimMode.PROACTIVE}", f"refault_budget={_BUDGET}"],
        )
    return VmConfig(
        name=f"dense{number}",
        memory=MEMORY,
        translation_buffer=_TRANSLATION,
        image=ImageConfig(name="service", base="debian-s390x", files={"/opt/service.py": _SERVER}),
        network=UserNetwork(forward=(f"127.0.0.1:{FIRST_PORT + number}:80",), isolated=True),
        allow_exec=True,
        boot_timeout=300.0,
        reclaim=reclaim,
        balloon=BalloonConfig(deflate_on_oom=method is Method.BALLOON),
    )


class Host:
    """The guests, and what goes on beside them."""

    def __init__(self, fleet: Fleet, method: Method, fill: bool) -> None:
        self._fleet = fleet
        self._method = method
        self._fill = fill
        self._keepers: list[BalloonKeeper] = []
        self._chores = Chores("density", _on_bug)
        if method is Method.BALLOON:
            self._chores.begin("group", self._heed_group())
        # Each method by itself.
        fleet.set_limits(Limits(balloon=False))

    async def up(self, number: int) -> dict[str, Any]:
        """Start a guest that serves, and has filled its memory."""
        vm = await self._fleet.up(config(number, self._method), lambda _line: None)
        Path(f"/proc/{vm.process.pid}/oom_score_adj").write_text(_OOM_SCORE)
        if self._method is Method.BALLOON:
            keeper = BalloonKeeper(vm.qmp, Bounds(_LEAST, MEMORY))
            keeper.shrinking = True
            self._keepers.append(keeper)
            watch = GuestWatch(vm.qmp, 0.0, keeper.heard)
            self._chores.begin(f"balloon {number}", watch.follow())
        done = await vm.execute(["sh", "-c", f"{_SERVE} && {_FILL}" if self._fill else _SERVE], timeout=600.0)
        return {} if done.ok else {"error": f"guest {number}: {done.stderr.decode(errors='replace')}"}

    async def look(self) -> dict[str, Any]:
        """What is there of each guest."""
        return {"guests": [await _guest(vm) for vm in self._fleet.vms()]}

    async def _heed_group(self) -> None:
        """Balloons take more the less the group has left, as they would of a host."""
        while True:
            group = accounts.control_group(os.getpid())
            if group is not None:
                share = max(_RESERVE_LEAST, reserve_share(max(0.0, 1 - group.used / group.limit)))
                for keeper in self._keepers:
                    keeper.share = share
            await asyncio.sleep(1.0)

    async def close(self) -> None:
        """End all guests."""
        await self._chores.cancel()
        await self._fleet.close()


def _on_bug(task: str, error: BaseException) -> None:
    sys.stderr.write(f"{task}: {error!r}\n")


async def _guest(vm: Vm) -> dict[str, Any]:
    """Its figures; of one that can not go on, why."""
    if vm.failure.done():
        return {"name": vm.name, "gone": vm.failure.result()}
    try:
        measure = await vm.measure()
        return {"name": vm.name, "qemu_own_bytes": _own(vm.process.pid), **measure.model_dump(mode="json")}
    except (HvaError, OSError) as error:
        return {"name": vm.name, "gone": str(error)}


def _own(pid: int) -> int:
    """Bytes of a process without guest RAM; of files that it shares with others its part (proc_pid_smaps(5))."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("Pss_Anon:", "Pss_File:"))) << 10


async def _answered(host: Host, order: dict[str, Any]) -> dict[str, Any]:
    try:
        return await (host.up(order["up"]) if "up" in order else host.look())
    except HvaError as error:
        return {"error": str(error)}


async def _serve(host: Host) -> None:
    orders = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(orders), sys.stdin)
    coming = asyncio.ensure_future(orders.readline())
    while order := await coming:
        coming = asyncio.ensure_future(orders.readline())
        answer = asyncio.create_task(_answered(host, json.loads(order)))
        await asyncio.wait({answer, coming}, return_when=asyncio.FIRST_COMPLETED)
        if not answer.done() and not coming.result():
            # Whoever asked has gone.
            answer.cancel()
            with suppress(asyncio.CancelledError):
                await answer
            return
        print(json.dumps(await answer), flush=True)


async def _main(method: Method, fill: bool) -> None:
    with tempfile.TemporaryDirectory(prefix="hvdense") as folder:
        os.environ["HVAQEMU_STATE_DIR"] = f"{folder}/state"
        runtime = Path(folder) / "run"
        runtime.mkdir(mode=0o700)
        fleet = Fleet(runtime, embedded=True)
        host = Host(fleet, method, fill)
        try:
            await _serve(host)
        finally:
            await host.close()


if __name__ == "__main__":
    asyncio.run(_main(Method(sys.argv[1]), sys.argv[2] == "fill"))
