"""A load's process: an order in one line on standard input; once the service answers, an empty line on standard output,
and when standard input ends, the report. An error is one line that begins with ``!``.
"""

from __future__ import annotations

import asyncio
import gc
import sys

from hva_host.load.model import LoadOrder
from hva_host.load.sender import Sender
from hvaqemu.errors import HvaError


async def _main() -> None:
    order = LoadOrder.model_validate_json(await asyncio.to_thread(sys.stdin.readline))
    sender = Sender(order)
    try:
        await sender.wait_ready()
    except HvaError as error:
        print(f"!{error}", flush=True)
        return
    print(flush=True)
    stop = asyncio.Event()
    # A collection would be seen as a wait of the service's.
    gc.freeze()
    gc.disable()
    # Ends also with whoever gave the order.
    ending = asyncio.create_task(asyncio.to_thread(sys.stdin.read))
    ending.add_done_callback(lambda _task: stop.set())
    print((await sender.run(stop)).model_dump_json(), flush=True)


if __name__ == "__main__":
    asyncio.run(_main())
