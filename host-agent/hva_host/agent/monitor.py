"""An operator's way to QEMU's monitor, past a guard: QEMU serves one QMP client at a time, and that is the host agent.

What would make discarding unsafe is refused with a reason; while something reads or writes all of guest RAM, reclaim
pauses, and goes on by itself. A courtesy, as for the arguments: what is started through another monitor is found in the
QEMU that runs (:mod:`hva_host.agent.hazards`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress

from hva_host.agent.chain import Chain
from hva_host.agent.hazard_watch import HazardWatch
from hva_host.agent.refusals import Refusals, Source
from hvaqemu.errors import DeadlineExceeded, HvaError, PeerLost, RefusedError
from hvaqemu.qemu import unsafe
from hvaqemu.qemu.command import GOLDEN_NODE, RAM_ID, disk_id
from hvaqemu.qemu.qmp import QmpLink
from hvaqemu.units import format_size

Arguments = Mapping[str, object]
_Check = Callable[[Arguments], str]

#: An epoch that is under way is waited for so long, in seconds.
_EPOCH_SECONDS = 60.0
_USERFAULTFD = "it needs a userfaultfd of its own on the guest's RAM, and the pager holds the only one"
_ARRIVING = "a guest that arrives would write its RAM past the pager; start it on a QEMU of its own"
_DESCRIPTORS = "descriptors can not be passed through hvaqemu; use a path, or a monitor of your own (qemu_args: -qmp)"

#: Never passed on.
_REFUSED = {
    "migrate-incoming": _ARRIVING,
    "migrate-recover": _USERFAULTFD,
    "migrate-start-postcopy": _USERFAULTFD,
    "x-colo-lost-heartbeat": "COLO keeps a second copy of the guest's RAM",
    "getfd": _DESCRIPTORS,
    "add-fd": _DESCRIPTORS,
    "quit": "use 'hvaqemu down'",
}
#: Read or write much of guest RAM while they run, or begin a job or migration that does.
_WHOLE_RAM = frozenset(
    ("migrate", "snapshot-save", "snapshot-load", "snapshot-delete", "dump-guest-memory", "pmemsave", "memsave")
)
#: The same of the human monitor, and what only shows something there. The rest has a QMP command that can be checked.
_HMP_WHOLE_RAM = frozenset(("savevm", "loadvm", "delvm"))
_HMP_HARMLESS = frozenset(
    ("info", "help", "?", "x", "xp", "print", "p", "sum", "gpa2hva", "gva2gpa", "qom-list", "log")
)
#: Change which files a disk consists of, or what lies in which.
_CHANGES_CHAIN = frozenset(("blockdev-snapshot", "blockdev-snapshot-sync", "block-commit", "block-stream"))
_OPENS_GOLDEN = frozenset(("blockdev-add", "x-blockdev-set-iothread"))


class Monitor:
    """One VM's.

    :param exclusive: held during an epoch.
    :param room: bytes of guest RAM that are discarded, and bytes the host has left.
    """

    def __init__(
        self,
        qmp: QmpLink,
        exclusive: asyncio.Lock,
        refusals: Refusals,
        hazards: HazardWatch,
        room: Callable[[], Awaitable[tuple[int, int]]],
        chains: Callable[[], Sequence[Chain]] = tuple,
    ) -> None:
        self._qmp = qmp
        self._exclusive = exclusive
        self._refusals = refusals
        self._hazards = hazards
        self._room = room
        self._chains = chains
        #: Commands under way that keep reclaim from going on.
        self._under_way: list[str] = []

    async def execute(self, command: str, arguments: Arguments, timeout: float) -> object:
        """What QEMU returns.

        :param timeout: seconds for QEMU's answer, and for an epoch under way before it.
        :raise RefusedError: it would make discarding unsafe, or bring back more than the host has room for.
        :raise QmpError: QEMU refuses.
        :raise HvaError: QEMU went, or did not answer in time; the command may still take effect.
        """
        if reason := refusal(command, arguments, self._chains()):
            raise RefusedError(f"QMP {command}: {reason}")
        if not self._qmp.connected:
            raise PeerLost("QMP: not connected")
        whole = uses_whole_ram(command, arguments)
        if whole:
            self._under_way.append(command)
            self._say()
        try:
            if whole:
                await self._no_epoch(command)
                await self._refuse_without_room(command, arguments)
            return await self._qmp.execute(command, arguments or None, timeout=timeout)
        finally:
            # Jobs and migrations it leaves behind are QEMU's to tell of; one that does not answer gets no epochs.
            with suppress(HvaError):
                await self._hazards.look()
            if whole:
                self._under_way.remove(command)
                self._say()

    async def _refuse_without_room(self, command: str, arguments: Arguments) -> None:
        discarded, available = await self._room()
        size = arguments.get("size")
        wanted = min(discarded, size) if isinstance(size, int) else discarded
        if wanted > available:
            raise RefusedError(
                f"QMP {command}: QEMU would read all of guest RAM, which brings back {format_size(wanted)}, and the "
                f"host has {format_size(available)} available",
                "make room first; 'hvaqemu restore' then brings it back before a migration rather than during it",
            )

    def _say(self) -> None:
        self._refusals.set(Source.MONITOR, f"QMP {', '.join(self._under_way)} is under way" if self._under_way else "")

    async def _no_epoch(self, command: str) -> None:
        """Wait for the epoch under way; none begins any more, because there is a reason now."""
        try:
            async with asyncio.timeout(_EPOCH_SECONDS):
                await self._exclusive.acquire()
        except TimeoutError as error:
            raise DeadlineExceeded(f"QMP {command}: a reclaim or restore is still under way") from error
        self._exclusive.release()


def refusal(command: str, arguments: Arguments, chains: Sequence[Chain] = ()) -> str:
    """Why a command is not passed on, or "".

    :param chains: the VM's own disks.
    """
    if command in _REFUSED:
        return _REFUSED[command]
    if command in _CHECKS and (reason := _CHECKS[command](arguments)):
        return reason
    if command == "transaction" and (reason := _transaction(arguments, chains)):
        return reason
    given = unsafe.flat(arguments)
    if (
        GOLDEN_NODE in given.values()
        and not command.startswith(("query-", "x-query-"))
        and command not in _OPENS_GOLDEN
    ):
        return f"{GOLDEN_NODE} is the image that VMs share, and pages depend on it: it never changes"
    return "" if command.startswith(("query-", "x-query-")) else _of_chains(command, set(given.values()), chains)


def _of_chains(command: str, given: set[str], chains: Sequence[Chain]) -> str:
    """Why a command must not be given these nodes of the VM's own disks, or ""."""
    for chain in chains:
        for path in chain.frozen:
            if path.stem in given:
                return f"{path.stem} is a frozen layer, and pages depend on it; use 'hvaqemu merge'"
        if command in _CHANGES_CHAIN and given & {chain.active.stem, disk_id(chain.disk)}:
            return f"{chain.active.stem} is a disk of the VM's own; use 'hvaqemu freeze' or 'hvaqemu merge'"
    return ""


def uses_whole_ram(command: str, arguments: Arguments) -> bool:
    """Whether a command reads or writes so much of guest RAM that no epoch should run beside it."""
    return command in _WHOLE_RAM or (command == "human-monitor-command" and _first_word(arguments) in _HMP_WHOLE_RAM)


def _device(arguments: Arguments) -> str:
    return unsafe.device(unsafe.flat(arguments))


def _object(arguments: Arguments) -> str:
    return unsafe.made_object(unsafe.flat(arguments))


def _network(arguments: Arguments) -> str:
    return unsafe.network(unsafe.flat(arguments))


def _block(arguments: Arguments) -> str:
    return unsafe.block(unsafe.flat(arguments))


def _medium(arguments: Arguments) -> str:
    if "format" not in arguments:
        return "QEMU would guess the image's format, which the guest can forge; give it as format"
    return _block(arguments)


def _commit(arguments: Arguments) -> str:
    # Without one, the lowest image is what is written to (QEMU, qapi/block-core.json, block-commit).
    return "" if "base-node" in arguments else "it would write to the image that VMs share; give base-node"


def _capabilities(arguments: Arguments) -> str:
    wanted = arguments.get("capabilities")
    for each in wanted if isinstance(wanted, list) else ():
        if isinstance(each, dict) and each.get("state") and each.get("capability") in unsafe.CAPABILITIES:
            return f"{each['capability']}: {unsafe.CAPABILITIES[each['capability']]}"
    return ""


def _migrate(arguments: Arguments) -> str:
    uri = str(arguments.get("uri", ""))
    if uri.startswith("exec:"):
        return "exec: QEMU may start no programs, and its sandbox would end it; use unix: or tcp:"
    if uri.startswith("rdma:"):
        return "rdma: it pins guest RAM, and writes past its write protection; use tcp:"
    return ""


def _property(arguments: Arguments) -> str:
    if str(arguments.get("path", "")).rstrip("/").endswith(f"/{RAM_ID}") or arguments.get("path") == RAM_ID:
        return f"{RAM_ID} is the guest's RAM, and stays as it was made"
    value = unsafe.flat({str(arguments.get("property", "")): arguments.get("value")})
    return unsafe.switches(value)


def _human(arguments: Arguments) -> str:
    word = _first_word(arguments)
    if word in _HMP_HARMLESS | _HMP_WHOLE_RAM or not word:
        return ""
    return f"{word}: what it would do can not be told; use the QMP command for it"


def _first_word(arguments: Arguments) -> str:
    return (str(arguments.get("command-line", "")).split() or [""])[0]


def _transaction(arguments: Arguments, chains: Sequence[Chain]) -> str:
    actions = arguments.get("actions")
    for action in actions if isinstance(actions, list) else ():
        data = action.get("data") if isinstance(action, dict) else None
        if isinstance(data, dict) and (reason := refusal(str(action.get("type")), data, chains)):
            return f"{action.get('type')}: {reason}"
    return ""


_CHECKS: Mapping[str, _Check] = {
    "device_add": _device,
    "object-add": _object,
    "netdev_add": _network,
    "blockdev-add": _block,
    "blockdev-reopen": _block,
    "blockdev-change-medium": _medium,
    "drive-mirror": _medium,
    "drive-backup": _medium,
    "block-commit": _commit,
    "migrate": _migrate,
    "migrate-set-capabilities": _capabilities,
    "qom-set": _property,
    "human-monitor-command": _human,
}
