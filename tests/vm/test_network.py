"""A guest's network: reached from this host, shown, and gone with its VM, whoever dies and when."""

from __future__ import annotations

import asyncio
import hashlib
import json
import signal
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from hva_host.agent.model import VmState
from hvaqemu.config import VmConfig
from hvaqemu.faultpoints import VARIABLE
from hvaqemu.network_config import TapNetwork, UserNetwork
from hvaqemu.units import MiB
from tests.networks import MARK, a_bridge, devices, ip, namespaces
from tests.vm.dhcp_server import dhcp_server
from tests.vm.harness import BOTH, STEP_SECONDS, Guest, running_guest, until
from tests.vm.host import Host, own_host
from tests.vm.ordinary_user import User, why_no_user

pytestmark = pytest.mark.timeout(900)

_NAME = f"{MARK}-vm"
_GUEST, _HOST = "10.213.7.2", "10.213.7.1"
_MEMORY = 192 * MiB
_POINTS = [f"agent.network.{point}" for point in ("recorded", "namespace", "link", "made")]
#: What a guest serves: a file of random bytes, and at /sum its checksum.
_SERVE = (
    "mkdir /srv/www; cd /srv/www; dd if=/dev/urandom of=file bs=64k count=16 2>/dev/null; md5sum <file >sum;"
    " setsid busybox httpd -p 80 -h /srv/www"
)


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    yield
    assert not devices() + namespaces()


async def fetch(url: str) -> bytes:
    """What a server says, once it is there."""

    def get() -> bytes:
        with urllib.request.urlopen(url, timeout=30) as answer:
            return bytes(answer.read())

    async with asyncio.timeout(STEP_SECONDS):
        while True:
            try:
                return await asyncio.to_thread(get)
            except OSError:
                await asyncio.sleep(0.1)


async def verified(base: str) -> None:
    """What the guest serves comes over whole."""
    digest = hashlib.md5(await fetch(f"{base}/file")).hexdigest()
    assert (await fetch(f"{base}/sum")).decode().split()[0] == digest


def tap(**keys: str) -> TapNetwork:
    return TapNetwork.model_validate({"type": "tap", **keys})


async def test_a_user_network_and_its_forwarded_port(unused_tcp_port: int) -> None:
    network = UserNetwork(forward=(f"{unused_tcp_port}:80",))
    async with running_guest(_NAME, memory=_MEMORY, network=network) as guest:
        await guest.run(_SERVE)
        await verified(f"http://127.0.0.1:{unused_tcp_port}")
        assert (await guest.run("cat /proc/sys/kernel/hostname")).strip() == _NAME
        assert await reaches_the_host(guest, 60)
        status = (await guest.vm.status()).network
        assert status is not None
        assert (status.type, status.forward) == ("user", [f"127.0.0.1:{unused_tcp_port}:80"])
        assert status.mac in await guest.run("ip link show eth0")
        # What comes in by the network is written to guest RAM by QEMU, beside epochs.
        for _ in range(5):
            await asyncio.gather(guest.vm.reclaim(BOTH, epochs=1), verified(f"http://127.0.0.1:{unused_tcp_port}"))
        assert await guest.complaints() == []


async def test_an_isolated_guest_reaches_nobody(unused_tcp_port: int) -> None:
    network = UserNetwork(forward=(f"{unused_tcp_port}:80",), isolated=True)
    async with running_guest(_NAME, memory=_MEMORY, network=network) as guest:
        await guest.run(_SERVE)
        await verified(f"http://127.0.0.1:{unused_tcp_port}")
        assert not await reaches_the_host(guest, 5)


async def reaches_the_host(guest: Guest, seconds: int) -> bool:
    """Whether the guest connects to a port of the host's loopback within so many seconds."""
    server = await asyncio.start_server(lambda _reader, writer: writer.close(), "127.0.0.1")
    async with server:
        port = server.sockets[0].getsockname()[1]
        code = f"import socket; socket.create_connection(('10.0.2.2', {port}), {seconds})"
        return (await guest.vm.execute(["python3", "-c", code], timeout=STEP_SECONDS)).ok


@pytest.mark.usefixtures("networks_allowed")
async def test_a_namespace_goes_when_qemu_is_killed() -> None:
    network = tap(namespace=f"{MARK}-ns", address=f"{_GUEST}/24")
    async with running_guest(_NAME, memory=_MEMORY, network=network) as guest:
        await guest.run(_SERVE)
        await verified(f"http://{_GUEST}")
        status = (await guest.vm.status()).network
        assert status is not None
        assert (status.address, status.namespace, [status.device]) == (_GUEST, f"{MARK}-ns", devices())
        guest.vm.process.send_signal(signal.SIGKILL)
        # Nobody has said `down` yet.
        await until(lambda: not devices() + namespaces(), STEP_SECONDS, "the end of the network")
        assert guest.vm.state is VmState.GONE


@pytest.mark.usefixtures("networks_allowed")
async def test_a_bridge_and_a_host_agent_that_is_killed() -> None:
    with a_bridge(f"{MARK}b", f"{_HOST}/24") as bridge, own_host() as host:
        file = host.folder / "vm.yaml"
        host.folder.mkdir(exist_ok=True)
        network = f"{{type: tap, bridge: {bridge}, address: {_GUEST}/24}}"
        file.write_text(vm(network))
        await host.command("up", file)
        await host.command("exec", _NAME, "--", "sh", "-c", _SERVE)
        await verified(f"http://{_GUEST}")
        for pid in host.agents():
            host.send(pid, signal.SIGKILL)
        await verified(f"http://{_GUEST}")
        shown = await host.command("status", _NAME)
        assert _GUEST in shown
        assert bridge in shown
        assert _GUEST in await host.command("ls")
        await verified(f"http://{_GUEST}")
        (port,) = [name for name in devices() if name != bridge]
        assert json.loads(ip("-j", "link", "show", port))[0]["master"] == bridge
        await host.command("down", _NAME)
        await host.all_gone()
        assert devices() == [bridge]


@pytest.mark.usefixtures("networks_allowed")
async def test_an_address_by_dhcp() -> None:
    with a_bridge(f"{MARK}b", f"{_HOST}/24") as bridge, dhcp_server(bridge, _HOST, _GUEST) as asked:
        async with running_guest(_NAME, memory=_MEMORY, network=tap(bridge=bridge)) as guest:
            await guest.run(_SERVE)
            await verified(f"http://{_GUEST}")
            assert "nameserver 10.213.7.1" in await guest.run("cat /etc/resolv.conf")
            status = (await guest.vm.status()).network
            assert status is not None
            assert set(asked) == {status.mac}


@pytest.mark.usefixtures("networks_allowed")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
async def test_an_interrupted_run_leaves_nothing(number: signal.Signals, tmp_path: Path) -> None:
    with own_host() as host:
        file = tmp_path / "scenario.yaml"
        network = f"{{type: tap, namespace: {MARK}-ns, address: {_GUEST}/24}}"
        keys = vm(network).replace("\n", "\n  ").rstrip()
        file.write_text(f"vm:\n  {keys}\nsteps:\n  - guest: 'true'\n  - sleep: 600s\n")
        run = await asyncio.create_subprocess_exec(
            *map(str, host.argv("run", file)), env=host.full_environment, stdout=asyncio.subprocess.PIPE
        )
        try:
            assert run.stdout is not None
            async with asyncio.timeout(STEP_SECONDS * 3):
                while b"guest: true" not in await run.stdout.readline():
                    pass
            assert namespaces()
            run.send_signal(number)
            async with asyncio.timeout(STEP_SECONDS):
                await run.communicate()
            assert run.returncode == 128 + number
        finally:
            with suppress(ProcessLookupError):
                run.kill()
        assert not devices() + namespaces()


@pytest.mark.usefixtures("networks_allowed")
@pytest.mark.parametrize("point", _POINTS)
async def test_a_host_agent_killed_while_it_makes_a_network(point: str) -> None:
    with own_host() as host:
        host.folder.mkdir(exist_ok=True)
        armed = host.folder / point
        armed.touch()
        host.environment[VARIABLE] = f"{point}:kill:{armed}"
        file = host.folder / "vm.yaml"
        file.write_text(vm(f"{{type: tap, namespace: {MARK}-ns, address: {_GUEST}/24}}"))
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(VARIABLE, host.environment[VARIABLE])
            with pytest.raises(AssertionError, match="host agent"):
                await host.command("up", file)
            assert not armed.exists(), "nobody came to the point"
            # What it left, the next one clears away before it answers anybody.
            assert json.loads(await host.command("ls", "--json")) == []
            assert not devices() + namespaces()
            await host.all_gone()


def vm(network: str) -> str:
    return f"name: {_NAME}\nmemory: 192M\nallow_exec: true\nboot_timeout: 240s\nnetwork: {network}\n"


@asynccontextmanager
async def up_fails(host: Host, network: str) -> AsyncIterator[Callable[[], str]]:
    host.folder.mkdir(exist_ok=True)
    file = host.folder / "vm.yaml"
    file.write_text(vm(network))
    done = await asyncio.to_thread(
        subprocess.run, host.argv("up", file), capture_output=True, text=True, env=host.full_environment, timeout=300
    )
    assert done.returncode == 1, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("hvaqemu: ")]
    assert len(lines) == 1, done.stderr
    yield lambda: lines[0]
    assert json.loads(await host.command("ls", "--json")) == []


@pytest.mark.usefixtures("networks_allowed")
async def test_what_does_not_go_here_is_one_line(unused_tcp_port: int) -> None:
    taken = await asyncio.start_server(lambda _reader, writer: writer.close(), "127.0.0.1", unused_tcp_port)
    name = f"{MARK}-ns"
    ip("netns", "add", name)
    try:
        with own_host() as host:
            for network, said in (
                ("{type: tap, bridge: nosuchbridge}", "network.bridge: nosuchbridge: there is no such bridge"),
                ("{type: tap, bridge: lo}", "network.bridge: lo: is a network device, but no bridge"),
                (f"{{type: tap, namespace: {name}, address: {_GUEST}/24}}", f"network.namespace: {name}: there is one"),
                (f"{{type: user, forward: ['{unused_tcp_port}:80']}}", f"127.0.0.1:{unused_tcp_port}"),
            ):
                async with up_fails(host, network) as line:
                    assert said in line(), line()
                # Somebody else's is still there, and nothing of ours.
                assert (devices(), namespaces()) == ([], [name])
            await host.all_gone()
    finally:
        ip("netns", "del", name)
        taken.close()


def test_without_the_privilege_it_says_what_to_do() -> None:
    if why := why_no_user():
        pytest.skip(why)
    with tempfile.TemporaryDirectory(prefix="hvp-", dir="/tmp") as folder:
        user = User(Path(folder))
        file = user.home / "vm.yaml"
        file.write_text(vm(f"{{type: tap, address: {_GUEST}/24}}"))
        command = f"{sys.executable} -m hva_host.cli.main"
        done = user("sh", "-c", f"{command} up {file}; status=$?; {command} agent --stop 2>/dev/null; exit $status")
        assert done.returncode == 1
        (line,) = [line for line in done.stderr.splitlines() if line.startswith("hvaqemu: ")]
        assert "network: /dev/net/tun: Permission denied (be root, or have CAP_NET_ADMIN" in line
        assert "network: user" in line
        assert user.left() == []


def test_a_config_without_a_network_is_one_with_a_user_network() -> None:
    assert VmConfig(name="one", memory=_MEMORY).network == UserNetwork()
