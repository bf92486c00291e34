"""A VM's network as its host agent sees it: made before QEMU starts, shown while it runs, removed once QEMU is gone."""

from __future__ import annotations

import asyncio

from hva_host.agent.model import NetworkStatus
from hva_host.agent.records import VmFolder
from hvaqemu.config import VmConfig
from hvaqemu.network_config import USER_ADDRESS, NoNetwork, TapNetwork, UserNetwork
from hvaqemu.qemu.host_network import HostNetwork, MadeNetwork
from hvaqemu.qemu.network import mac_of


async def make(host: HostNetwork, config: VmConfig) -> NetworkStatus:
    """Make what the VM's network needs on the host, if anything; how it is reached.

    :raise HvaError: it can not be made; :func:`remove` takes away what there is of it.
    """
    made = None
    if isinstance(config.network, TapNetwork):
        made = await asyncio.to_thread(host.make, config.network, mac_of(config))
    return _status(config, made)


def _status(config: VmConfig, made: MadeNetwork | None) -> NetworkStatus:
    network = config.network
    if isinstance(network, NoNetwork):
        return NetworkStatus(type=network.type)
    if isinstance(network, UserNetwork):
        address = str(USER_ADDRESS.ip)
        return NetworkStatus(type=network.type, mac=mac_of(config), address=address, forward=list(network.forward))
    return NetworkStatus(
        type=network.type,
        mac=mac_of(config),
        address=str(network.address.ip) if network.address is not None else "",
        device=made.link if made is not None else "",
        bridge=network.bridge or "",
        namespace=network.namespace or "",
    )


async def remove(folder: VmFolder) -> None:
    """Remove what a VM's network needed on the host. Its QEMU must have ended.

    :raise HostError: it can not be removed; the record stays, and it may be tried again.
    """
    await remove_made(HostNetwork(folder.name, folder.path))


async def remove_made(host: HostNetwork) -> None:
    """The same, by what made it. Goes on to the end when it is cancelled.

    :raise HostError: as :func:`remove`.
    """
    work = asyncio.ensure_future(asyncio.to_thread(host.remove))
    try:
        await asyncio.shield(work)
    except asyncio.CancelledError:
        await asyncio.wait({work})
        raise
