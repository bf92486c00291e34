"""Machine profiles: what the rest of the project must know of a QEMU machine, and nothing else knows."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

from hvaqemu.errors import ConfigError
from hvaqemu.pages import PAGE_SIZE
from hvaqemu.units import MiB, format_size


@dataclass(frozen=True)
class RamRegion:
    """Consecutive guest physical addresses and where in the RAM backing they lie. All in bytes."""

    guest_start: int
    backing_offset: int
    size: int


@dataclass(frozen=True)
class MachineProfile:
    """One kind of machine. Sizes in bytes."""

    name: str
    #: QEMU's program and its machine type.
    binary: str
    machine: str
    #: The end of the machine's virtio device names ("virtio-blk-ccw").
    virtio_suffix: str
    console_device: str
    page_size: int
    minimum_memory: int
    memory_alignment: int
    max_cpus: int
    #: MiB of the translation buffer where a VM does not say. QEMU's default lets it grow by 100 MiB and is no faster;
    #: with 16 a guest that starts many programs takes 1.6 times the processor time (docs/operations.md).
    translation_mib: int

    def ram_regions(self, memory: int) -> tuple[RamRegion, ...]:
        """Where guest physical memory lies in the one RAM backend of a machine with ``memory`` bytes.

        s390-ccw-virtio maps it as one region from address 0 (QEMU, hw/s390x/s390-virtio-ccw.c, s390_memory_init).
        """
        return (RamRegion(guest_start=0, backing_offset=0, size=memory),)

    def check_memory(self, memory: int) -> str:
        """Why a machine can not have ``memory`` bytes, or ""."""
        if memory < self.minimum_memory:
            return f"{format_size(memory)} is too little for {self.name}; give at least {self.minimum_memory // MiB}M"
        if memory % self.memory_alignment:
            return f"{memory} bytes is not a whole number of {self.memory_alignment // MiB}M"
        return ""


S390X = MachineProfile(
    name="s390x",
    binary="qemu-system-s390x",
    machine="s390-ccw-virtio",
    virtio_suffix="-ccw",
    console_device="sclpconsole",
    page_size=PAGE_SIZE,
    minimum_memory=128 * MiB,
    memory_alignment=MiB,
    max_cpus=248,
    translation_mib=32,
)

PROFILES = MappingProxyType({profile.name: profile for profile in (S390X,)})


def profile_named(name: str) -> MachineProfile:
    """The profile a user calls ``name``.

    :raise ConfigError: there is none.
    """
    try:
        return PROFILES[name]
    except KeyError as error:
        raise ConfigError(f"{name!r} is not a machine profile", f"known: {', '.join(PROFILES)}") from error
