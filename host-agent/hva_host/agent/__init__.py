"""The asyncio host agent: VMs, their links, epochs, the control socket."""
