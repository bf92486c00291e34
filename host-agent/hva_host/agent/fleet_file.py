"""The fleet file of a host agent: its VMs are started, what it says of reclaim is kept to, and it is read again when
asked. A host agent that is started without one goes on with the file of the one before it.

What somebody set by hand stays until the file says something else of that VM than it did.
"""

from __future__ import annotations

import json
import logging
import os
from contextlib import suppress
from pathlib import Path

from pydantic import ValidationError

from hva_host.agent.chores import Chores
from hva_host.agent.condition import Listener
from hva_host.agent.fleet import Fleet
from hva_host.policy.samples import Limits
from hvaqemu.config import VmConfig
from hvaqemu.errors import HostError, HvaError, RefusedError
from hvaqemu.fleet_config import FleetConfig, load_fleet
from hvaqemu.reclaim_config import ReclaimConfig

log = logging.getLogger(__name__)

_RECORD = "fleet-file"


class FleetFile:
    """Keeps a fleet as its file says.

    :param runtime: the runtime directory; remembers which file it is.
    :param tell: told of the file having been read, and of what came of its VMs.
    """

    def __init__(self, runtime: Path, fleet: Fleet, tell: Listener) -> None:
        self._record = runtime / _RECORD
        self._fleet = fleet
        self._tell = tell
        self._chores = Chores(
            "fleet file", lambda task, error: tell("TASK_FAILED", {"task": task, "error": repr(error)})
        )
        self._path: Path | None = None
        self._config: FleetConfig | None = None
        #: What the file said of reclaim when it was taken up last, by VM.
        self._said: dict[str, ReclaimConfig] = {}
        #: VMs that it has started and that are not there yet.
        self._coming: set[str] = set()

    @property
    def config(self) -> FleetConfig:
        """What it says; nothing, where there is none."""
        return self._config or FleetConfig()

    def read(self, path: Path) -> None:
        """Read a fleet file; nothing is changed yet.

        :raise ConfigError: naming the file, line and key.
        :raise HostError: no room to remember the file.
        """
        config = load_fleet(path)
        self._remember(path.absolute())
        self._config, self._path = config, path.absolute()

    def _remember(self, path: Path) -> None:
        said = {name: reclaim.model_dump(mode="json") for name, reclaim in self._said.items()}
        new = self._record.with_name(f"{_RECORD}.new")
        try:
            new.write_text(json.dumps({"path": os.fspath(path), "reclaim": said}))
            new.replace(self._record)
        except OSError as error:
            raise HostError(f"{self._record}: {error.strerror}", "make room") from error

    def recall(self) -> None:
        """Read the file that was read last in this runtime directory, if there was one. One that is wrong now is told
        of, and does not keep a host agent from its VMs."""
        with suppress(FileNotFoundError):
            self._path, self._said = _recorded(self._record.read_bytes())
            try:
                self.read(self._path)
            except HvaError as error:
                self._refuse(error)

    def forget(self) -> None:
        """Go on without a file, also in host agents to come. VMs stay as they are."""
        with suppress(FileNotFoundError):
            self._record.unlink()

    def apply(self) -> None:
        """Have the fleet be as the file says. VMs that it does not name are left alone; those it names and that do not
        run are started, beside. Where there is no file, or the remembered one is wrong, nothing is changed."""
        config = self._config
        if self._path is None or config is None:
            return
        self._fleet.set_limits(
            Limits(
                budget_bytes=config.budget,
                available_bytes=config.available_min,
                psi_some=config.pressure.psi_some,
                cgroup_headroom=config.pressure.cgroup_headroom,
                balloon=config.pressure.balloon,
            )
        )
        missed: set[str] = set()
        running = {vm.name for vm in self._fleet.vms() if vm.process.alive}
        for vm in config.vms:
            if vm.name in self._coming:
                # Its keys are looked at again once it is there.
                continue
            if vm.name not in running | set(self._fleet.starting):
                self._coming.add(vm.name)
                self._chores.begin(f"start VM {vm.name}", self._up(vm))
            elif vm.reclaim != self._said.get(vm.name) and not self._set(vm):
                missed.add(vm.name)
        self._said = {vm.name: vm.reclaim for vm in config.vms if vm.name not in missed}
        with suppress(HostError):
            # Then the next host agent compares with what it said before.
            self._remember(self._path)
        self._tell("FLEET_FILE", {"path": str(self._path), "vms": [vm.name for vm in config.vms]})

    def _set(self, config: VmConfig) -> bool:
        """Have a VM be reclaimed from as the file says; whether it is."""
        try:
            if config.reclaim != self._fleet.get(config.name).config.reclaim:
                self._fleet.set_reclaim(config.name, config.reclaim)
        except HvaError as error:
            log.error("VM %s: what the fleet file says of reclaim is not taken up: %s", config.name, error)
            return False
        return True

    def reload(self) -> None:
        """Read the file again and have the fleet be as it says now.

        :raise HvaError: there is none, or as :meth:`read`; all stays as it was.
        """
        if self._path is None:
            raise RefusedError("this host agent has no fleet file", "start it with 'hvaqemu agent --config FILE'")
        try:
            self.read(self._path)
        except HvaError as error:
            self._refuse(error)
            raise
        self.apply()

    def _refuse(self, error: HvaError) -> None:
        log.error("the fleet file is not taken up: %s", error)
        self._tell("FLEET_FILE_REFUSED", {"error": str(error)})

    async def close(self) -> None:
        """Stop starting VMs."""
        await self._chores.cancel()

    async def _up(self, config: VmConfig) -> None:
        try:
            await self._fleet.up(config, lambda text: log.info("VM %s: %s", config.name, text))
        except HvaError as error:
            log.error("VM %s was not started: %s", config.name, error)
            self._tell("VM_NOT_STARTED", {"name": config.name, "error": str(error)})
        finally:
            self._coming.discard(config.name)
        now = next((vm for vm in self._config.vms if vm.name == config.name), config) if self._config else config
        if now.reclaim != config.reclaim:
            self._set(now)


def _recorded(record: bytes) -> tuple[Path, dict[str, ReclaimConfig]]:
    """Which file it is, and what it said of reclaim by VM; where that can not be read any more, nothing."""
    try:
        found = json.loads(record)
        path, said = Path(found["path"]), found["reclaim"].items()
    except (ValueError, TypeError, KeyError, AttributeError):
        # As versions before this one wrote it.
        return Path(os.fsdecode(record)), {}
    known: dict[str, ReclaimConfig] = {}
    for name, keys in said:
        with suppress(ValidationError):
            known[name] = ReclaimConfig.model_validate(keys)
    return path, known
