"""The library that is preloaded into QEMU (``shim.c``), and what builds it."""

from hva_host.shim.build import ensure_shim

__all__ = ["ensure_shim"]
