"""The guest's initramfs: busybox, the drivers of its disk and channels, and a script.

A cpio archive in the kernel's "newc" format (Documentation/driver-api/early-userspace/buffer-format.rst), the same
bytes for the same input.
"""

from __future__ import annotations

import io
import stat
import struct
from dataclasses import dataclass
from pathlib import Path

from hva_images.modules import builtin_modules, dep_lines, load_order, module_name, read_modules
from hvaqemu.errors import HostError

#: Drivers the guest needs before its root disk is there (ext4 asks for crc32c by alias); the others load from it.
DRIVERS = ["virtio_blk", "virtio_console", "virtio_balloon", "virtio_rng", "crc32c_generic", "ext4"]
_LIBRARY_DIRS = ("usr/lib/s390x-linux-gnu", "usr/lib")


@dataclass(frozen=True)
class Entry:
    """A file of the archive. ``device`` is major and minor of a character device."""

    path: str
    mode: int
    content: bytes = b""
    device: tuple[int, int] = (0, 0)


def cpio(entries: list[Entry]) -> bytes:
    """The archive of ``entries``; directories come before what is in them."""
    out = io.BytesIO()
    for number, entry in enumerate([*entries, Entry("TRAILER!!!", 0)]):
        name = entry.path.encode() + b"\0"
        links = 2 if stat.S_ISDIR(entry.mode) else 1
        fields = (number, entry.mode, 0, 0, links, 0, len(entry.content), 0, 0, *entry.device, len(name), 0)
        out.write(b"070701" + b"".join(b"%08X" % value for value in fields) + name)
        out.write(bytes(-out.tell() % 4))
        out.write(entry.content)
        out.write(bytes(-out.tell() % 4))
    out.write(bytes(-out.tell() % 512))
    return out.getvalue()


def build_initramfs(tree: Path, release: str, script: bytes) -> bytes:
    """The archive for kernel ``release``, made from the files in ``tree``; ``script`` becomes its ``/init``, with
    the names of :data:`DRIVERS` in place of ``@DRIVERS@``.

    :raise HostError: ``tree`` lacks something it needs.
    """
    directory = tree / "usr/lib/modules" / release
    builtin = builtin_modules(directory)
    drivers = {module_name(each.path): each for each in load_order(read_modules(directory), DRIVERS, builtin)}
    busybox = (tree / "usr/bin/busybox").read_bytes()
    modules = f"lib/modules/{release}"
    paths = [f"{modules}/{module.path}" for module in drivers.values()]
    directories = {str(parent) for path in paths for parent in Path(path).parents} - {"."}
    directories |= {"bin", "dev", "etc", "newroot", "proc", "sys"}
    entries = [Entry(path, stat.S_IFDIR | 0o755) for path in sorted(directories)]
    entries += [
        Entry("dev/console", stat.S_IFCHR | 0o600, device=(5, 1)),
        Entry("bin/busybox", stat.S_IFREG | 0o755, busybox),
        Entry("bin/sh", stat.S_IFLNK | 0o777, b"busybox"),
        Entry("etc/fstab", stat.S_IFREG | 0o644, b"dev /dev devtmpfs rw\nproc /proc proc rw\nsys /sys sysfs rw\n"),
        Entry("init", stat.S_IFREG | 0o755, script.replace(b"@DRIVERS@", " ".join(DRIVERS).encode())),
    ]
    entries += [
        Entry(f"lib/{name}", stat.S_IFREG | 0o755, text) for name, text in sorted(_libraries(tree, busybox).items())
    ]
    entries += [Entry(path, stat.S_IFREG | 0o644, (tree / "usr" / path).read_bytes()) for path in paths]
    needs = "".join(f"{line}\n" for line in dep_lines(drivers, builtin).values())
    entries.append(Entry(f"{modules}/modules.dep", stat.S_IFREG | 0o644, needs.encode()))
    return cpio(entries)


def _libraries(tree: Path, program: bytes) -> dict[str, bytes]:
    """What ``program`` is linked with, by name, libraries' own needs included."""
    found: dict[str, bytes] = {}
    todo = needed_libraries(program)
    while todo:
        name = todo.pop().split("/")[-1]
        if name in found:
            continue
        path = next((tree / where / name for where in _LIBRARY_DIRS if (tree / where / name).exists()), None)
        if path is None:
            raise HostError(f"the image has no library {name}")
        found[name] = path.read_bytes()
        todo += needed_libraries(found[name])
    return found


def needed_libraries(program: bytes) -> list[str]:
    """The program interpreter and the needed libraries of a 64-bit ELF file (elf(5)); none for a static program.

    :raise HostError: it is no such file.
    """
    if program[:5] != b"\x7fELF\x02":
        raise HostError("busybox or a library of it is not a 64-bit ELF file")
    order = ">" if program[5] == 2 else "<"
    offset, size, count = (
        *struct.unpack_from(f"{order}Q", program, 32),
        *struct.unpack_from(f"{order}HH", program, 54),
    )
    headers = [struct.unpack_from(f"{order}IIQQQQ", program, offset + index * size) for index in range(count)]
    names: list[str] = []
    for kind, _, start, _, _, length in headers:
        if kind == 3:  # PT_INTERP
            names.append(program[start : start + length].rstrip(b"\0").decode())
        if kind == 2:  # PT_DYNAMIC
            tags = [struct.unpack_from(f"{order}QQ", program, start + at) for at in range(0, length, 16)]
            strings = next(value for tag, value in tags if tag == 5)  # DT_STRTAB, an address
            base = next(
                start_ - at + strings for k, _, start_, at, _, len_ in headers if k == 1 and at <= strings < at + len_
            )
            for tag, value in tags:
                if tag == 1:  # DT_NEEDED
                    names.append(program[base + value : program.index(b"\0", base + value)].decode())
    return names
