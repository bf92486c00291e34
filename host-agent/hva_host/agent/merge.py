"""Merging: what lies in several frozen files of a disk is written into the lowest of them, its *target*.

Only the target changes, so only the target must have nobody who depends on it. The golden image is never a target. All
frozen files above the target are merged, so that the file which QEMU then points at the target is the writable one: no
other layer's header changes. The order, with a fault point between each two steps:

1. the merge is recorded. From here on :func:`merge` is called again, by whatever host agent there is, until it is over;
   each step may be done twice.
2. the pager matches nothing new with the target, makes its pages resident and forgets it. If one can not be made
   resident, nothing was written yet, and the merge is off.
3. the record and the watch forget the target: nobody depends on it, nobody holds a lease that QEMU would wait for.
4. QEMU commits, as a job. The files above still hold all that the target is given, and lie above it, so the chain reads
   the same at every moment, also if QEMU is killed, also if the job is cancelled half-way.
5. QEMU's block graph is believed: without the merged files, if the job came to its end.
6. the merged files are withdrawn from matching. What depends on them goes on to; they stay on disk for it.
7. the target, which is a frozen file that is no layer now, is indexed and becomes one, whatever came of the job.
8. a merged file that no page depends on is forgotten by the pager, then by the record, and then deleted
   (:func:`sweep`, which is also called later).
"""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from hva_host.agent.chain import Chain, Merge
from hva_host.agent.freezer import Disks, believe, index_frozen
from hvaqemu.errors import DeadlineExceeded, HostError, HvaError, RefusedError
from hvaqemu.faultpoints import reach
from hvaqemu.pages import PAGE_SHIFT
from hvaqemu.qemu.qmp import QmpError
from hvaqemu.units import format_duration

_POLL_SECONDS = 0.1
_CANCEL_SECONDS = 30.0


def plan(chain: Chain, place: int) -> Merge:
    """The merge of all frozen files above the one at ``place``, counted from the bottom, into it.

    :raise RefusedError: there are none.
    """
    if not 0 <= place < len(chain.frozen) - 1:
        raise RefusedError(f"disk {chain.disk}: {len(chain.frozen)} frozen files, nothing to merge")
    return Merge(disk=chain.disk, target=chain.frozen[place], sources=chain.frozen[place + 1 :])


async def merge(disks: Disks, wanted: Merge, patience: float) -> str:
    """Carry a merge out, or on; why it did not come to its end, or "".

    :param patience: seconds; a job that moves nothing for so long is taken back.
    :raise RefusedError: a page that depends on the target can not be made resident.
    :raise HvaError: QEMU or the pager went or was silent; the merge is still recorded, and is to be gone on with.
    """
    if disks.keeper.record.merging != wanted:
        disks.store(merging=wanted)
    reach("agent.merge.recorded")
    await believe(disks)
    done, why = _is_done(disks, wanted), ""
    # One that has ended keeps the disk to itself until it is dismissed.
    job = await _job(disks, wanted)
    if not done or job is not None:
        try:
            if job is None:
                await _withdraw_target(disks, wanted)
                await _begin(disks, wanted)
            reach("agent.merge.begun")
            why = await _wait(disks, wanted, patience)
        except asyncio.CancelledError:
            with suppress(HvaError):
                await asyncio.shield(_take_back(disks, wanted))
            raise
        await believe(disks)
        done = _is_done(disks, wanted)
    reach("agent.merge.committed")
    if done:
        await _retire(disks, wanted)
    disks.store(merging=None, retired=_retired(disks, wanted if done else None))
    reach("agent.merge.retired")
    await index_frozen(disks)
    return "" if done else why or "QEMU ended it"


async def sweep(disks: Disks) -> dict[Path, str]:
    """Delete merged files that no page depends on any more; why those that could not be deleted were not.

    :raise HvaError: the pager went or was silent.
    """
    failed: dict[Path, str] = {}
    retired = disks.keeper.record.retired
    known = await disks.book.dependants() if set(retired) & set(disks.book.images) else []
    for path in retired:
        if path in disks.book.images:
            slots = [layer for layer in known if layer["path"] == str(path)]
            withdrawn = all(layer["withdrawn"] for layer in slots)
            if withdrawn and any(layer["pages"] for layer in slots):
                continue
            async with disks.exclusive:
                if not withdrawn:
                    # A pager that was started after the merge has taken it for a new layer.
                    await disks.book.withdraw(path, move=False)
                if not await disks.book.drop(path):
                    continue
        try:
            reach("agent.merge.dropped")
            path.unlink(missing_ok=True)
        except OSError as error:
            # It stays recorded, and is tried again.
            failed[path] = error.strerror or str(error)
            continue
        disks.store(retired=tuple(other for other in disks.keeper.record.retired if other != path))
    return failed


def _is_done(disks: Disks, wanted: Merge) -> bool:
    """Whether the merged files are out of the chain, as far as QEMU was asked."""
    return not set(wanted.sources) & set(disks.chain(wanted.disk).files)


async def _withdraw_target(disks: Disks, wanted: Merge) -> None:
    if wanted.target in disks.book.images:
        async with disks.exclusive:
            layers = await disks.book.dependants()
            pages = sum(layer["pages"] for layer in layers if layer["path"] == str(wanted.target))
            if pages << PAGE_SHIFT > disks.available():
                disks.store(merging=None)
                raise RefusedError(f"{wanted.target}: {pages} pages depend on it, and the host has no room for them")
            left, why = await disks.book.withdraw(wanted.target, move=True)
            if left or not await disks.book.drop(wanted.target):
                # It serves on, and nothing new is matched with it: dropped once nothing depends on it.
                disks.store(merging=None)
                raise RefusedError(f"{wanted.target}: {left} pages depend on it and can not be made resident: {why}")
    reach("agent.merge.withdrawn")


async def _begin(disks: Disks, wanted: Merge) -> None:
    try:
        # QEMU opens it again for writing, as whatever user it runs.
        wanted.target.chmod(0o600)
    except OSError as error:
        raise HostError(f"{wanted.target}: {error.strerror}") from error
    arguments: dict[str, object] = {
        "job-id": _job_id(wanted),
        "device": disks.chain(wanted.disk).active.stem,
        "top-node": wanted.sources[-1].stem,
        "base-node": wanted.target.stem,
        "backing-file": str(wanted.target),
        # So that a host agent which comes later still finds out what became of it.
        "auto-dismiss": False,
    }
    await disks.qmp().execute("block-commit", arguments)


async def _wait(disks: Disks, wanted: Merge, patience: float) -> str:
    """Wait for the job, or take it back, and dismiss it; what QEMU or we have against it, or "". The block graph tells
    what came of it.

    :raise DeadlineExceeded: it moved nothing for a while, and can not be taken back.
    """
    moved, since = -1, time.monotonic()
    while (job := await _job(disks, wanted)) is not None:
        data = {"disk": wanted.disk, "done": job["current-progress"], "size": job["total-progress"]}
        if job["status"] == "concluded":
            why = str(job.get("error", ""))
            await disks.qmp().execute("job-dismiss", {"id": _job_id(wanted)})
            disks.tell("MERGE_ENDED", {**data, "error": why})
            return why
        if job["current-progress"] != moved:
            moved, since = job["current-progress"], time.monotonic()
            disks.tell("MERGING", data)
        elif time.monotonic() - since > patience:
            why = f"it moved nothing for {format_duration(patience)}"
            await _cancel(disks, wanted)
            disks.tell("MERGE_ENDED", {**data, "error": why})
            return why
        # QEMU tells of a job's states, not of how far it has come.
        await asyncio.sleep(_POLL_SECONDS)
    return ""


async def _take_back(disks: Disks, wanted: Merge) -> None:
    """Nobody wants it any more. What it has written lies below files that say the same."""
    await _cancel(disks, wanted)
    await believe(disks)
    if not _is_done(disks, wanted):
        disks.store(merging=None)


async def _cancel(disks: Disks, wanted: Merge) -> None:
    """End the job, also one that somebody paused.

    :raise DeadlineExceeded: it goes on.
    """
    with suppress(QmpError):
        await disks.qmp().execute("job-cancel", {"id": _job_id(wanted)})
    until = time.monotonic() + _CANCEL_SECONDS
    while (job := await _job(disks, wanted)) is not None:
        if job["status"] == "concluded":
            await disks.qmp().execute("job-dismiss", {"id": _job_id(wanted)})
            return
        if time.monotonic() > until:
            raise DeadlineExceeded(f"disk {wanted.disk}: QEMU did not end the merge within {_CANCEL_SECONDS:.0f} s")
        # As in _wait, whose job this was: an event may have gone to a host agent before us.
        await asyncio.sleep(_POLL_SECONDS)


async def _job(disks: Disks, wanted: Merge) -> dict[str, Any] | None:
    answer = await disks.qmp().execute("query-jobs")
    jobs = answer if isinstance(answer, list) else []
    return next((job for job in jobs if isinstance(job, dict) and job.get("id") == _job_id(wanted)), None)


async def _retire(disks: Disks, wanted: Merge) -> None:
    # From the top: each is held by the one above it. One that stayed open would be an overlay of the target still, and
    # have its header changed, and so a layer's bytes, when the target is merged away itself.
    for path in reversed(wanted.sources):
        # QEMU keeps what was opened by name until it is told otherwise.
        with suppress(QmpError):
            await disks.qmp().execute("blockdev-del", {"node-name": path.stem})
        if path in disks.book.images:
            async with disks.exclusive:
                await disks.book.withdraw(path, move=False)


def _retired(disks: Disks, ended: Merge | None) -> tuple[Path, ...]:
    return tuple(dict.fromkeys((*disks.keeper.record.retired, *(ended.sources if ended else ()))))


def _job_id(wanted: Merge) -> str:
    return f"hva-merge-{wanted.disk}"
