"""hvaqemu: page hints and reclaim for stock QEMU guests. This package is the ground both agents stand on."""

__version__ = "0.1.0"
