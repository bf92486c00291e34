"""The pager process: ``python -m hva_host.pager --pid PID --listen FD``. One loop, one thread, faults first."""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import resource
import select
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from hva_host.memory.layers import Layer
from hva_host.memory.ledger import VERSION, Counter
from hva_host.memory.syscalls import lock_memory
from hva_host.pager import refusals
from hva_host.pager.attach import attach
from hva_host.pager.epoch import Epoch, Phase, Step
from hva_host.pager.fetch import Fetcher
from hva_host.pager.messages import Message
from hva_host.pager.prove import Prover
from hva_host.pager.ram import Ram
from hva_host.pager.refaults import Refaults
from hva_host.pager.restore import restore
from hva_host.pager.server import Client, Server
from hvaqemu.errors import HvaError, PeerLost, RefusedError
from hvaqemu.pages import Residence

_WAIT_SECONDS = 0.002
_DISK_SECONDS = 0.005
_IDLE_SECONDS = 30.0
_HELD_SHOWN = 64
_BATCHES = 16
#: A poll that took longer than this was woken by what it found; a shorter one found it waiting.
_WOKEN_SECONDS = 20e-6


class Pager:
    """One VM's pager."""

    def __init__(self, pid: int, listener: socket.socket) -> None:
        self._pid = pid
        self._pidfd = os.pidfd_open(pid)
        self._ram: Ram = attach(pid, self._pidfd)
        self._fetcher = Fetcher()
        self._prover = Prover(self._ram)
        self._epoch: Epoch | None = None
        self._announced = False
        self._refaults = Refaults(self._ram, self._leave, self._fetcher)
        self._work: Iterator[Step] | None = None
        self._finish: Callable[[], None] = lambda: None
        self._resume_at = 0.0
        self._reading_ahead = False
        self._poller = select.epoll()
        for fd in (self._ram.uffd.fd, self._pidfd, self._fetcher.fd):
            self._poller.register(fd, select.EPOLLIN)
        self._server = Server(listener, self._poller)
        self._commands: dict[str, Callable[[Message, bytes], dict[str, Any]]] = {
            "hello": self._hello,
            "add-layer": self._add_layer,
            "begin-epoch": self._begin_epoch,
            "confirm": self._confirm,
            "abandon": self._abandon,
            "resume": self._resume,
            "status": self._status,
        }

    def run(self) -> None:
        """Serve until QEMU ends.

        :raise PeerLost: QEMU is gone.
        """
        quiet_since = time.monotonic()
        retry_at: float | None = None
        while True:
            polled_at = time.monotonic()
            events = self._poller.poll(self._timeout(polled_at, retry_at))
            now = time.monotonic()
            ready_at = now if now - polled_at > _WOKEN_SECONDS else quiet_since
            others = []
            for fd, event in events:
                if fd == self._ram.uffd.fd:
                    self._answer_faults(ready_at)
                else:
                    others.append((fd, event))
            quiet_since = time.monotonic()
            for fd, event in others:
                if fd == self._pidfd:
                    raise PeerLost("QEMU has ended")
                self._handle(fd, event)
            retry_at = self._refaults.retry(time.monotonic())
            self._reading_ahead = self._refaults.read_ahead()
            self._advance()
            self._announce_held()

    def _timeout(self, now: float, retry_at: float | None) -> float:
        if self._reading_ahead:
            return 0.0
        until = now + _IDLE_SECONDS
        if self._work is not None:
            until = self._resume_at
        if retry_at is not None:
            until = min(until, retry_at)
        return max(0.0, until - now)

    def _answer_faults(self, ready_at: float) -> None:
        # Bounded, so that a guest that faults without end does not keep epochs from their deadline.
        for _ in range(_BATCHES):
            faults = self._ram.uffd.read()
            if not faults:
                return
            self._refaults.answer(faults, ready_at)
            ready_at = time.monotonic()

    def _leave(self, start: int, stop: int) -> None:
        if self._epoch is not None:
            self._epoch.leave(start, stop)

    def _handle(self, fd: int, event: int) -> None:
        if fd == self._fetcher.fd:
            for result in self._fetcher.results():
                self._refaults.fetched(result)
        elif self._server.owns(fd):
            for client, message, payload in self._server.handle(fd, event):
                self._execute(client, message, payload)

    def _execute(self, client: Client, message: Message, payload: bytes) -> None:
        answer: Message = {"id": message.get("id")}
        command = message.get("execute")
        arguments = message.get("arguments") or {}
        try:
            if command == "restore":
                self._begin_restore(client, message)
                return
            if command not in self._commands:
                raise RefusedError(f"the pager knows no command {command!r}")
            answer["return"] = self._commands[command](arguments, payload)
        except PeerLost:
            raise
        except (HvaError, KeyError, ValueError, TypeError) as error:
            answer["error"] = str(error)
        self._server.reply(client, answer)

    def _hello(self, _arguments: Message, _payload: bytes) -> dict[str, Any]:
        return {"pages": self._ram.pages, "pid": os.getpid(), "version": VERSION}

    def _add_layer(self, arguments: Message, _payload: bytes) -> dict[str, Any]:
        return {"slot": self._ram.add_layer(Layer(Path(arguments["path"]), Path(arguments["index"])))}

    def _begin_epoch(self, arguments: Message, payload: bytes) -> dict[str, Any]:
        self._refuse_when_busy()
        refusals.refuse(self._pid, self._ram.backing)
        deadline = time.monotonic() + float(arguments["seconds"])
        epoch = Epoch(self._ram, self._prover, np.frombuffer(payload, np.uint8), deadline)
        self._epoch, self._announced = epoch, False
        self._start(epoch.steps(), lambda: self._epoch_done(epoch))
        return {"number": epoch.number}

    def _confirm(self, arguments: Message, payload: bytes) -> dict[str, Any]:
        free = np.unpackbits(np.frombuffer(payload, np.uint8), count=self._ram.pages).astype(np.bool_)
        accepted = self._epoch is not None and self._epoch.confirm(
            bytes.fromhex(arguments["epoch"]), int(arguments["round"]), free
        )
        if accepted:
            self._resume_at = 0.0
        return {"accepted": accepted}

    def _abandon(self, _arguments: Message, _payload: bytes) -> dict[str, Any]:
        if self._epoch is not None:
            self._epoch.abandon("its host agent gave it up")
            self._resume_at = 0.0
        return {}

    def _begin_restore(self, client: Client, message: Message) -> None:
        self._refuse_when_busy()
        before = sum(self._ram.ledger.totals().values())

        def done() -> None:
            left = sum(self._ram.ledger.totals().values())
            self._server.reply(client, {"id": message.get("id"), "return": {"pages": before - left, "left": left}})

        self._start(restore(self._ram, self._refaults, self._fetcher), done)

    def _resume(self, _arguments: Message, _payload: bytes) -> dict[str, Any]:
        for slot, record in self._ram.ledger.layers().items():
            if slot in self._ram.broken:
                with contextlib.suppress(HvaError):
                    self._ram.layers[slot] = Layer.recorded(record)
                    del self._ram.broken[slot]
        return {"held": self._refaults.resume()}

    def _status(self, _arguments: Message, _payload: bytes) -> dict[str, Any]:
        totals = self._ram.ledger.totals()
        counters = self._ram.ledger.counters
        return {
            "backing_bytes": self._ram.backing.used_bytes(),
            "zero_pages": totals[Residence.ZERO],
            "layer_pages": totals[Residence.LAYER],
            "preserved_pages": totals[Residence.PRESERVED],
            "refaults": int(counters[Counter.REFAULTS]),
            "refault_pages": int(counters[Counter.REFAULT_PAGES]),
            "discarded_pages": int(counters[Counter.DISCARDED_PAGES]),
            "first_touches": int(counters[Counter.FIRST_TOUCHES]),
            "write_faults": int(counters[Counter.WRITE_FAULTS]),
            "epochs": int(counters[Counter.EPOCHS]),
            "store_bytes": self._ram.store_bytes(),
            "stalls": self._refaults.stalls.as_dict(),
            "phase": self._epoch.phase if self._epoch else Phase.DONE,
            "held": self._held(),
        }

    def _refuse_when_busy(self) -> None:
        if self._work is not None:
            raise RefusedError("the pager is still at an epoch or a restore", "wait for it to end")

    def _start(self, work: Iterator[Step], finish: Callable[[], None]) -> None:
        self._work, self._finish, self._resume_at = work, finish, 0.0

    def _advance(self) -> None:
        now = time.monotonic()
        if self._work is None or now < self._resume_at:
            return
        step = next(self._work, None)
        self._announce_protected()
        if step is None:
            self._work = None
            self._finish()
        elif step is Step.CONFIRM:
            self._resume_at = now + _WAIT_SECONDS
        elif step is Step.DISK:
            self._resume_at = now + _DISK_SECONDS

    def _announce_protected(self) -> None:
        epoch = self._epoch
        if epoch is not None and epoch.identifier and not self._announced:
            self._announced = True
            data = {"epoch": epoch.identifier.hex(), "number": epoch.number, "wants": epoch.wants_confirmation()}
            self._server.broadcast({"event": "protected", "data": data})

    def _announce_held(self) -> None:
        if self._refaults.newly_held:
            self._refaults.newly_held = False
            if not self._refaults.held:
                return
            self._server.broadcast({"event": "held", "data": {"held": self._held()}})

    def _held(self) -> list[dict[str, Any]]:
        grouped: dict[tuple[str, str], list[int]] = {}
        for pfn, (layer, reason) in self._refaults.held.items():
            grouped.setdefault((layer, reason), []).append(pfn)
        return [
            {"layer": layer, "reason": reason, "pages": sorted(pages)[:_HELD_SHOWN]}
            for (layer, reason), pages in list(grouped.items())[:_HELD_SHOWN]
        ]

    def _epoch_done(self, epoch: Epoch) -> None:
        self._epoch = None
        data = {
            "number": epoch.number,
            **epoch.counts,
            "discarded": epoch.counts["discarded_zero"] + epoch.counts["discarded_layer"],
            "resident_before": epoch.resident_before,
            "seconds": epoch.seconds,
            "note": epoch.note,
        }
        self._server.broadcast({"event": "epoch-done", "data": data})


def _settle() -> None:
    """Make the process small to disturb: locked in memory, last for the OOM killer, the collector out of the way."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("-1000")
    # Without the right to raise the limit, the limit there is may still do.
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    with contextlib.suppress(OSError):
        lock_memory()
    gc.collect()
    gc.freeze()


def main(arguments: list[str] | None = None) -> int:
    """Run the process; exit status 0 once QEMU has ended, 1 if it could not attach."""
    parser = argparse.ArgumentParser(prog="hva-pager", description=__doc__)
    parser.add_argument("--pid", type=int, required=True, help="the QEMU to attach to")
    parser.add_argument("--listen", type=int, required=True, help="descriptor of a listening unix socket")
    options = parser.parse_args(arguments)
    try:
        pager = Pager(options.pid, socket.socket(fileno=options.listen))
        _settle()
        pager.run()
    except PeerLost:
        return 0
    except (HvaError, ProcessLookupError) as error:
        sys.stderr.write(f"pager: {error}\n")
        return 1
    return 0
