"""QEMU from outside: what its machines are, its command line, its process, its monitor, its disks."""
