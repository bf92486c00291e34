"""``hvaqemu top`` while it is looked at: looks, keys, and what the keys begin."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path

from rich.console import Console, RenderableType
from rich.text import Text

from hva_host.agent.client import AgentFailed, ControlClient, NotServed
from hva_host.agent.control import CONTROL_SOCKET
from hva_host.agent.event_files import LoggedEvent, events_folder, last_events
from hva_host.agent.model import VmState
from hva_host.cli import top_screen
from hva_host.cli.output import WARN, cell
from hva_host.cli.terminal import Terminal
from hva_host.cli.text import one_line
from hva_host.cli.top_view import Look, TopView, VmRow, top_view
from hvaqemu.errors import HvaError
from hvaqemu.reclaim_config import DEFAULT_STATES
from hvaqemu.units import format_size

_CONNECT_SECONDS = 10.0
_QMP_SECONDS = 30.0
#: Events of the selected VM that are read, and that there is always room for.
_EVENTS_MOST, _EVENTS_LEAST = 30, 3
NO_VM = "no VM is running; start one with: hvaqemu up VM.yaml"


async def two_looks(runtime: Path, interval: float) -> tuple[Look, Look]:
    """All VMs now, and ``interval`` seconds later.

    :raise NotServed: no host agent runs.
    :raise HvaError: it went or was silent.
    """
    client = await _connect(runtime)
    try:
        first = await _look(client)
        await asyncio.sleep(interval)
        return first, await _look(client)
    finally:
        await client.close()


async def live(runtime: Path, interval: float) -> None:
    """Show all VMs until "q" is pressed or the terminal goes.

    :raise NotServed: no host agent runs.
    """
    # Said on the terminal as it is, before it is ours.
    await (await _connect(runtime)).close()
    await _Top(runtime, interval).run()


async def _connect(runtime: Path) -> ControlClient:
    try:
        return await ControlClient.connect(runtime / CONTROL_SOCKET, _CONNECT_SECONDS)
    except NotServed as error:
        raise NotServed(f"{runtime}: no host agent runs", "`hvaqemu up` starts one; `hvaqemu ls`, too") from error


async def _look(client: ControlClient) -> Look:
    vms = await client.vms()
    return Look(asyncio.get_running_loop().time(), vms)


class _Top:
    """What is on the screen, and what changes it."""

    def __init__(self, runtime: Path, interval: float) -> None:
        self._runtime = runtime
        self._interval = interval
        self._console = Console(highlight=False, markup=False, emoji=False)
        self._terminal = Terminal(self._console, self._pressed, self._draw)
        self._view: TopView | None = None
        self._events: list[LoggedEvent] = []
        self._selected: str | None = None
        self._trouble = ""
        self._said = ""
        #: Done when it is to end; failed by a bug in what a key began.
        self._over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        #: Asks for a look before the interval is over.
        self._look_now = asyncio.Event()
        #: What keys have begun, by VM.
        self._doing: dict[str, asyncio.Task[None]] = {}

    async def run(self) -> None:
        looking = asyncio.create_task(self._looks(), name="looks")
        with self._terminal:
            try:
                done, _ = await asyncio.wait({looking, self._over}, return_when=asyncio.FIRST_COMPLETED)
                for each in done:
                    each.result()
            finally:
                tasks = {looking, *self._doing.values()}
                for task in tasks:
                    task.cancel()
                await asyncio.wait(tasks)

    # Looks

    async def _looks(self) -> None:
        while True:
            try:
                client = await _connect(self._runtime)
                try:
                    await self._follow(client)
                finally:
                    await client.close()
            except (HvaError, AgentFailed) as error:
                self._trouble = f"{one_line(str(error))}; it is tried again"
                self._draw()
                await asyncio.sleep(self._interval)

    async def _follow(self, client: ControlClient) -> None:
        before: Look | None = None
        while True:
            now = await _look(client)
            self._view, before, self._trouble = top_view(before, now), now, ""
            names = [row.name for row in self._view.vms]
            if self._selected not in names:
                self._selected = names[0] if names else None
            await self._learn_events()
            self._draw()
            with suppress(TimeoutError):
                async with asyncio.timeout(self._interval):
                    await self._look_now.wait()
            self._look_now.clear()

    async def _learn_events(self) -> None:
        name = self._selected
        found = await asyncio.to_thread(last_events, events_folder(), name, _EVENTS_MOST) if name else []
        if name == self._selected:
            self._events = found

    # The screen

    def _draw(self) -> None:
        self._terminal.show(*self._parts())

    def _parts(self) -> list[RenderableType]:
        """Lines and a table, as many as the screen has room for: below the VMs what is known of the selected one, with
        as many events as fit, then what keys did and do."""
        height = self._console.size.height
        ascii_only = not self._console.encoding.lower().startswith("utf")
        top: list[RenderableType] = [cell(self._trouble, WARN)] if self._trouble else []
        bottom: list[RenderableType] = [cell(self._said or " "), Text(top_screen.KEYS, style="dim", no_wrap=True)]
        view, row = self._view, self._row()
        if view is None or row is None:
            nothing = "asking the host agent ..." if view is None else NO_VM
            return [*top, nothing, "", *bottom]
        about = top_screen.details(row)
        top += [top_screen.head(view), top_screen.legend(ascii_only), ""]
        rows = self._window(view.vms, height - len(top) - len(about) - len(bottom) - _EVENTS_LEAST - 3)
        room = height - len(top) - 1 - len(rows) - 2 - len(about) - len(bottom)
        table = top_screen.listed(view.model_copy(update={"vms": rows}), row.name, ascii_only)
        events = top_screen.happened(self._events[-room:]) if room > 0 else []
        return [*top, table, "", *about, *events, *[""] * (1 + room - len(events)), *bottom]

    def _window(self, rows: list[VmRow], room: int) -> list[VmRow]:
        """So many of the VMs, the selected one among them."""
        room = max(3, room)
        at = next((place for place, row in enumerate(rows) if row.name == self._selected), 0)
        first = max(0, min(at - room // 2, len(rows) - room))
        return rows[first : first + room]

    def _row(self) -> VmRow | None:
        rows = self._view.vms if self._view is not None else []
        return next((row for row in rows if row.name == self._selected), None)

    # Keys

    def _pressed(self, key: str) -> None:
        if key in ("q", ""):
            if not self._over.done():
                self._over.set_result(None)
        elif key in ("up", "k", "down", "j"):
            self._select(-1 if key in ("up", "k") else 1)
        elif (row := self._row()) is not None and (action := self._action(key, row)) is not None:
            self._begin(row.name, action)

    def _select(self, step: int) -> None:
        names = [row.name for row in self._view.vms] if self._view is not None else []
        if self._selected in names:
            at = names.index(self._selected) + step
            self._selected = names[max(0, min(at, len(names) - 1))]
            self._events = []
            self._look_now.set()
            self._draw()

    def _action(self, key: str, row: VmRow) -> Callable[[ControlClient], Awaitable[str]] | None:
        name = row.name

        async def pause(client: ControlClient) -> str:
            await client.qmp(name, "cont" if row.state is VmState.PAUSED else "stop", {}, _QMP_SECONDS)
            return "goes on" if row.state is VmState.PAUSED else "is paused"

        async def reclaim(client: ControlClient) -> str:
            result = await client.reclaim(name, list(DEFAULT_STATES), None, lambda _stats: self._look_now.set())
            return f"{format_size(result.backing_before_bytes - result.backing_after_bytes)} given back"

        async def restore(client: ControlClient) -> str:
            return f"{await client.restore(name):,} pages made resident"

        return {"p": pause, "r": reclaim, "o": restore}.get(key)

    def _begin(self, name: str, action: Callable[[ControlClient], Awaitable[str]]) -> None:
        if name in self._doing:
            self._say(f"{name}: {self._doing[name].get_name()} is still going on")
            return
        task = asyncio.create_task(self._do(name, action), name=getattr(action, "__name__", "it"))
        self._doing[name] = task
        task.add_done_callback(lambda done: self._ended(name, done))
        self._say(f"{name}: {task.get_name()} ...")

    async def _do(self, name: str, action: Callable[[ControlClient], Awaitable[str]]) -> None:
        try:
            # A connection of its own: the looks go on meanwhile.
            client = await _connect(self._runtime)
            try:
                said = f"{name}: {await action(client)}"
            finally:
                await client.close()
        except (HvaError, AgentFailed) as error:
            said = one_line(str(error))
        # Before it is said: who reads that may press the next key.
        self._doing.pop(name, None)
        self._say(said)
        self._look_now.set()

    def _ended(self, name: str, task: asyncio.Task[None]) -> None:
        if self._doing.get(name) is task:
            del self._doing[name]
        if not task.cancelled() and (error := task.exception()) is not None and not self._over.done():
            self._over.set_exception(error)

    def _say(self, text: str) -> None:
        self._said = text
        self._draw()
