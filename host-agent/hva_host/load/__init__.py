"""A load on a service in a guest, from a process of its own: what it measures is the service, not the host agent."""
