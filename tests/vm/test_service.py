"""A service in a guest whose memory goes and comes back all the time serves every byte as it was."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from hva_host.load.model import LoadResult
from tests.vm.host import own_host

pytestmark = pytest.mark.timeout(1200)

_SERVER = Path(__file__).parents[2] / "examples/service/server.py"
#: Slower than any busy machine: what is looked at is the bytes.
_LOAD = 'url: ["/files/[0-255]", "/pages/[0-1999]"], rate: 8/s, timeout: 100s, ready: 100s'
_SCENARIO = """\
vm:
  name: served
  memory: 256M
  cpus: 2
  image: {{name: service, base: debian-s390x, files: {{/opt/service.py: {server}}}}}
  network: {{type: user, forward: ["{port}:80"]}}
  allow_exec: true
  boot_timeout: 240s
steps:
  - guest: "python3 -B /opt/service.py --start"
    timeout: 300s
  - load: {{{load}, save: before}}
  - sleep: 5s
  - load: stop
  - reclaim: {{states: [unused, volatile, potential, stable], every: 500ms}}
  - load: {{{load}, save: beside}}
  - sleep: 20s
  - load: stop
  - reclaim: stop
  - measure: reclaimed
  - expect: {{load: before}}
  - expect: {{load: beside, throughput: {{of: before, min_ratio: 0.5}}}}
"""


def test_every_byte_is_right(tmp_path: Path, unused_tcp_port: int) -> None:
    file, result = tmp_path / "scenario.yaml", tmp_path / "result.json"
    file.write_text(_SCENARIO.format(server=_SERVER, port=unused_tcp_port, load=_LOAD))
    with own_host() as host:
        done = subprocess.run(
            host.argv("run", file, "--json", result), capture_output=True, env=host.full_environment, timeout=1100
        )
    assert done.returncode == 0, done.stdout.decode()[-4000:] + done.stderr.decode()[-2000:]
    report = json.loads(result.read_text())
    loads = {name: LoadResult.model_validate(load) for name, load in report["loads"].items()}
    assert loads["before"].requests >= 30
    assert loads["beside"].requests >= 120
    assert {name: load.errors for name, load in loads.items()} == {"before": {}, "beside": {}}
    # The service's pages went meanwhile and came back.
    assert sum(epoch["discarded"] for epoch in report["epochs"]) > 5000
    assert report["measures"]["reclaimed"]["refault_pages"] > 500
