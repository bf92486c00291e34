"""What a host agent can ask of a pager (:mod:`hva_host.pager.messages` lists it), and what it is told unasked."""

from __future__ import annotations

import base64
import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from hva_host.memory.layers import Layer, open_layer
from hva_host.memory.ledger import VERSION, Counter
from hva_host.pager import refusals
from hva_host.pager.beside import Beside
from hva_host.pager.epoch import Epoch, Phase, Step
from hva_host.pager.fetch import Fetcher
from hva_host.pager.messages import RESIDENCE_PAGES_MAX, Message
from hva_host.pager.preserve import Preserver
from hva_host.pager.prove import Prover
from hva_host.pager.ram import Ram
from hva_host.pager.refaults import Refaults
from hva_host.pager.restore import restore
from hva_host.pager.sampling import Samples, Sampling
from hva_host.pager.server import Client, Server
from hva_host.pager.sources import Sources
from hva_host.pager.work import Work
from hvaqemu.errors import HvaError, PeerLost, RefusedError
from hvaqemu.faultpoints import reach
from hvaqemu.pages import Residence
from hvaqemu.protocol import pack_map

_HELD_SHOWN = 64
#: How long an answer to ``resume`` waits for the disk.
_RESUME_SECONDS = 5.0
#: Waits of :data:`Step.DISK` for bytes on their way: some ten seconds.
_FETCH_PATIENCE = 2000


class Commands:
    """The commands on one VM's pager.

    :param pid: the QEMU.
    """

    def __init__(
        self,
        pid: int,
        ram: Ram,
        refaults: Refaults,
        samples: Samples,
        fetcher: Fetcher,
        beside: Beside,
        work: Work,
        server: Server,
        sources: Sources,
    ) -> None:
        self._pid = pid
        self._ram = ram
        self._refaults = refaults
        self._samples = samples
        self._preserver = Preserver(ram)
        self._fetcher = fetcher
        self._beside = beside
        self._work = work
        self._server = server
        self._sources = sources
        self._prover = Prover(ram)
        self._announced = -1
        self._driver: Client | None = None
        #: Answers to ``resume`` that wait for the disk: to whom, to which message, and until when.
        self._resuming: list[tuple[Client, Message, float]] = []
        #: Answered at their end.
        self._lasting: dict[str, Callable[[Client, Message], None]] = {
            "add-layer": self._add_layer,
            "restore": self._begin_restore,
            "withdraw-layer": self._withdraw_layer,
            "drop-layer": self._drop_layer,
        }
        self._commands: dict[str, Callable[[Message, bytes], dict[str, Any]]] = {
            "hello": self._hello,
            "layers": self._layers,
            "begin-epoch": self._begin_epoch,
            "drained": self._drained,
            "confirm": self._confirm,
            "abandon": self._abandon,
            "residence": self._residence,
            "status": self._status,
        }

    def execute(self, client: Client, message: Message, payload: bytes) -> None:
        """Do what a message asks and answer it.

        :raise PeerLost: QEMU is gone.
        """
        answer: Message = {"id": message.get("id")}
        command = message.get("execute")
        arguments = message.get("arguments") or {}
        try:
            if command in self._lasting:
                self._lasting[command](client, message)
                return
            if command == "resume":
                self._begin_resume(client, message)
                return
            if command not in self._commands:
                raise RefusedError(f"the pager knows no command {command!r}")
            answer["return"] = self._commands[command](arguments, payload)
            if command == "begin-epoch":
                self._driver = client
        except PeerLost:
            raise
        except (HvaError, KeyError, ValueError, TypeError) as error:
            answer["error"] = str(error)
        self._server.reply(client, answer)

    def gone(self, client: Client) -> None:
        """A host agent hung up: nobody is left to carry confirmations for an epoch of its own."""
        if client is self._driver and self._work.epoch is not None:
            self._work.epoch.abandon("its host agent hung up")
            self._work.hurry()

    def announce(self) -> None:
        """Tell what has come about since the last call: an epoch that is protected, pages that are held."""
        if self._resuming:
            self._answer_resumed(time.monotonic())
        if self._work.epoch is not None:
            self._announce_protected(self._work.epoch)
        if self._refaults.newly_held:
            self._refaults.newly_held = False
            if self._refaults.held:
                self._server.broadcast({"event": "held", "data": {"held": self._held()}})

    def _announce_protected(self, epoch: Epoch) -> None:
        if epoch.identifier and epoch.number != self._announced:
            self._announced = epoch.number
            data = {
                "epoch": epoch.identifier.hex(),
                "number": epoch.number,
                "wants": epoch.wants_confirmation(),
                "drain": epoch.wants_drain(),
            }
            self._server.broadcast({"event": "protected", "data": data})

    def _hello(self, _arguments: Message, _payload: bytes) -> dict[str, Any]:
        return {"pages": self._ram.pages, "pid": os.getpid(), "version": VERSION}

    def _add_layer(self, client: Client, message: Message) -> None:
        """Its index is loaded beside: for a large one, faults would wait."""
        path, index = Path(message["arguments"]["path"]), Path(message["arguments"]["index"])

        def done(layer: Layer | Exception) -> None:
            answer: Message = {"id": message.get("id")}
            try:
                if isinstance(layer, Exception):
                    raise layer
                answer["return"] = {"slot": self._ram.add_layer(layer)}
                self._sources.trust(path, index)
            except Exception as error:
                answer["error"] = str(error)
            self._server.reply(client, answer)

        self._beside.begin(lambda: open_layer(path, index), done)

    def _layers(self, _arguments: Message, _payload: bytes) -> dict[str, Any]:
        withdrawn = self._ram.withdrawn
        return {
            "layers": [
                {
                    "slot": slot,
                    "path": record.path,
                    "withdrawn": slot in withdrawn,
                    "pages": len(self._ram.ledger.dependants({slot})),
                }
                for slot, record in self._ram.ledger.layers().items()
            ]
        }

    def _slots(self, message: Message) -> set[int]:
        """The slots of the layers at a path; there are several where a file was indexed again."""
        path = message["arguments"]["path"]
        return {slot for slot, record in self._ram.ledger.layers().items() if record.path == path}

    def _withdraw_layer(self, client: Client, message: Message) -> None:
        """Withdrawn first, at once and for good; then its dependants are moved, if that is wanted."""
        self._work.refuse_when_busy()
        slots = self._slots(message)
        before = len(self._ram.ledger.dependants(slots))
        for slot in slots:
            self._ram.withdraw_layer(slot)
        reach("pager.layer.withdrawn")

        def done() -> None:
            left = len(self._ram.ledger.dependants(slots))
            answer = {"pages": before - left, "left": left, "why": self._why_not_served()}
            self._server.reply(client, {"id": message.get("id"), "return": answer})

        if message["arguments"].get("move"):
            self._work.begin(restore(self._ram, self._refaults, self._fetcher, slots), done)
        else:
            done()

    def _drop_layer(self, client: Client, message: Message) -> None:
        """Forget withdrawn layers that nothing depends on, once no bytes are on their way for any of them."""
        self._work.refuse_when_busy()
        slots = self._slots(message)

        def steps() -> Iterator[Step]:
            for _ in range(_FETCH_PATIENCE):
                if not self._fetcher.under_way:
                    break
                yield Step.DISK

        def done() -> None:
            if not self._fetcher.under_way:
                for slot in slots & self._ram.withdrawn:
                    if not len(self._ram.ledger.dependants({slot})):
                        self._ram.drop_layer(slot)
            left = len(self._ram.ledger.dependants(slots))
            dropped = not slots & self._ram.ledger.layers().keys()
            self._server.reply(client, {"id": message.get("id"), "return": {"dropped": dropped, "left": left}})

        self._work.begin(steps(), done)

    def _begin_epoch(self, arguments: Message, payload: bytes) -> dict[str, Any]:
        self._work.refuse_when_busy()
        refusals.refuse(self._pid, self._ram.backing)
        wanted = np.frombuffer(payload, np.uint8)
        self._preserver.limit = int(arguments.get("store", 0))
        seconds, first = float(arguments["seconds"]), int(arguments["first"])
        drain, most = bool(arguments.get("drain")), arguments.get("most")
        sampling = Sampling(
            self._samples,
            int(arguments.get("round", 0)),
            copies=bool(arguments.get("sampled")),
            most=None if most is None else int(most),
        )
        epoch = Epoch(self._ram, self._prover, wanted, seconds, first, self._preserver, sampling, drain=drain)
        self._work.begin(epoch.steps(), lambda: self._epoch_done(epoch), epoch)
        return {"number": epoch.number}

    def _epoch_done(self, epoch: Epoch) -> None:
        # A short one is protected and done in one step.
        self._announce_protected(epoch)
        data = {
            "number": epoch.number,
            **epoch.counts,
            "discarded": sum(count for name, count in epoch.counts.items() if name.startswith("discarded_")),
            "resident_before": epoch.resident_before,
            "seconds": epoch.seconds,
            "protected_s": epoch.protected_seconds,
            "note": epoch.note,
        }
        self._server.broadcast({"event": "epoch-done", "data": data})

    def _drained(self, arguments: Message, _payload: bytes) -> dict[str, Any]:
        epoch = self._work.epoch
        accepted = epoch is not None and epoch.drained(bytes.fromhex(arguments["epoch"]))
        if accepted:
            self._work.hurry()
        return {"accepted": accepted}

    def _confirm(self, arguments: Message, payload: bytes) -> dict[str, Any]:
        epoch = self._work.epoch
        if epoch is None:
            return {"accepted": False}
        free = np.unpackbits(np.frombuffer(payload, np.uint8), count=epoch.pages).astype(np.bool_)
        accepted = epoch.confirm(bytes.fromhex(arguments["epoch"]), int(arguments["round"]), free)
        if accepted:
            self._work.hurry()
        return {"accepted": accepted}

    def _abandon(self, _arguments: Message, _payload: bytes) -> dict[str, Any]:
        if self._work.epoch is not None:
            self._work.epoch.abandon("its host agent gave it up")
            self._work.hurry()
        return {}

    def _begin_restore(self, client: Client, message: Message) -> None:
        before = sum(self._ram.ledger.totals().values())

        def done() -> None:
            left = sum(self._ram.ledger.totals().values())
            answer = {"pages": before - left, "left": left, "why": self._why_not_served()}
            self._server.reply(client, {"id": message.get("id"), "return": answer})

        self._work.begin(restore(self._ram, self._refaults, self._fetcher), done)

    def _why_not_served(self) -> str:
        why = {held.reason for held in (*self._refaults.held.values(), *self._refaults.unserved.values())}
        return "; ".join(sorted(why)[:3])

    def wanted_at(self) -> float | None:
        """When :meth:`announce` is to be called next (monotonic seconds), None while there is nothing to do."""
        return min((until for _, _, until in self._resuming), default=None)

    def _answer_resumed(self, now: float) -> None:
        waiting, self._resuming = self._resuming, []
        for client, message, until in waiting:
            if self._refaults.trying and now < until:
                self._resuming.append((client, message, until))
            else:
                self._server.reply(client, {"id": message.get("id"), "return": {"held": len(self._refaults.held)}})

    def _begin_resume(self, client: Client, message: Message) -> None:
        """Try what is held again; :meth:`announce` answers once the disk has brought what that needs."""
        for slot, record in self._ram.ledger.layers().items():
            if slot in self._ram.broken:
                with suppress(HvaError):
                    self._ram.layers[slot] = self._sources.layer(record)
                    del self._ram.broken[slot]
        left = self._refaults.resume()
        for slot, layer in self._ram.layers.items() if left else ():
            # The operator may have put a right file in the place of the one that is open.
            for file in self._sources.files(self._ram.ledger.layers()[slot]):
                if left and not os.path.sameopenfile(file.fileno(), layer.fd):
                    layer.switch(file)
                    left = self._refaults.resume()
        self._resuming.append((client, message, time.monotonic() + _RESUME_SECONDS))

    def _residence(self, arguments: Message, _payload: bytes) -> dict[str, Any]:
        start, pages = int(arguments["start"]), int(arguments["pages"])
        if not 0 <= start < start + pages <= self._ram.pages or pages > RESIDENCE_PAGES_MAX:
            raise RefusedError(f"no residence of pages {start} to {start + pages}")
        # By the ledger alone: presence wins only where a pager died, and then until the next attached.
        kinds = self._ram.ledger.kinds(slice(start, start + pages))
        return {"map": base64.b64encode(pack_map(kinds.tobytes())).decode()}

    def _status(self, _arguments: Message, _payload: bytes) -> dict[str, Any]:
        totals = self._ram.ledger.totals()
        counters = self._ram.ledger.counters
        epoch = self._work.epoch
        return {
            "backing_bytes": self._ram.backing.used_bytes(),
            "zero_pages": totals[Residence.ZERO],
            "layer_pages": totals[Residence.LAYER],
            "preserved_pages": totals[Residence.PRESERVED],
            "refaults": int(counters[Counter.REFAULTS]),
            "refault_pages": int(counters[Counter.REFAULT_PAGES]),
            "layer_pages_loaded": int(counters[Counter.LAYER_PAGES_LOADED]),
            "freed_pages": int(counters[Counter.FREED_PAGES]),
            "zero_refaults": int(counters[Counter.ZERO_REFAULTS]),
            "layer_refaults": int(counters[Counter.LAYER_REFAULTS]),
            "preserved_refaults": int(counters[Counter.PRESERVED_REFAULTS]),
            "discarded_pages": int(counters[Counter.DISCARDED_PAGES]),
            "first_touches": int(counters[Counter.FIRST_TOUCHES]),
            "write_faults": int(counters[Counter.WRITE_FAULTS]),
            "epochs": int(counters[Counter.EPOCHS]),
            "store_bytes": self._ram.store.used_bytes(),
            "store_file": self._ram.store.fd if self._ram.store.on_disk else None,
            "cold_pages": self._samples.copies.cold + self._samples.stable.cold,
            "stalls": self._refaults.stalls.as_dict(),
            "phase": epoch.phase if epoch else Phase.DONE,
            "held": self._held(),
        }

    def _held(self) -> list[dict[str, Any]]:
        grouped: dict[tuple[str, str], list[int]] = {}
        for pfn, (layer, reason) in self._refaults.held.items():
            grouped.setdefault((layer, reason), []).append(pfn)
        return [
            {"layer": layer, "reason": reason, "pages": sorted(pages)[:_HELD_SHOWN]}
            for (layer, reason), pages in list(grouped.items())[:_HELD_SHOWN]
        ]
