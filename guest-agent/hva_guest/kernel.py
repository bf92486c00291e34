"""What HELLO says of the guest's kernel: release, boot, and whether it looks at the content of free pages."""

from __future__ import annotations

import os
import re
import zlib
from typing import NamedTuple

from hva_guest.memory import read_bytes, read_text
from hvaqemu.protocol import Fact

#: Configuration that bears on the content of free pages.
_CONFIG = (
    "CONFIG_PAGE_POISONING",
    "CONFIG_DEBUG_PAGEALLOC",
    "CONFIG_DEBUG_PAGEALLOC_ENABLE_DEFAULT",
    "CONFIG_INIT_ON_ALLOC_DEFAULT_ON",
    "CONFIG_INIT_ON_FREE_DEFAULT_ON",
    "CONFIG_KASAN",
)
#: As the kernel's kstrtobool reads them.
_TRUE, _FALSE = ("1", "y", "Y", "on", "On", "ON"), ("0", "n", "N", "off", "Off", "OFF")


class Poisoning(NamedTuple):
    """The options by which a kernel fills or checks free pages."""

    page_poison: Fact
    debug_pagealloc: Fact
    init_on_alloc: Fact
    init_on_free: Fact
    config: tuple[str, ...]


def poisoning(command_line: str, config_text: str) -> Poisoning:
    """From the kernel's command line and its configuration, each "" if not readable."""
    config = tuple(name for name in _CONFIG if re.search(rf"^{name}=y$", config_text, re.MULTILINE))

    def fact(parameter: str, default: str) -> Fact:
        """The last ``parameter=`` counts; without one, ``default`` (a CONFIG name, or "": off)."""
        values = re.findall(rf"(?:^|\s){parameter}=(\S*)", command_line)
        if not command_line:
            return Fact.UNKNOWN
        if values:
            return Fact.ON if values[-1] in _TRUE else Fact.OFF if values[-1] in _FALSE else Fact.UNKNOWN
        if not default:
            return Fact.OFF
        if default in config:
            return Fact.ON
        return Fact.OFF if config_text else Fact.UNKNOWN

    pagealloc = fact("debug_pagealloc", "CONFIG_DEBUG_PAGEALLOC_ENABLE_DEFAULT")
    if config_text and "CONFIG_DEBUG_PAGEALLOC" not in config:
        # The parameter means nothing to a kernel that was built without it.
        pagealloc = Fact.OFF
    return Poisoning(
        fact("page_poison", ""),
        pagealloc,
        fact("init_on_alloc", "CONFIG_INIT_ON_ALLOC_DEFAULT_ON"),
        fact("init_on_free", "CONFIG_INIT_ON_FREE_DEFAULT_ON"),
        config,
    )


def read_config(release: str) -> str:
    """The running kernel's configuration, "" where it is not kept."""
    packed = read_bytes("/proc/config.gz")
    if not packed:
        return read_text(f"/boot/config-{release}")
    try:
        # 31: a gzip header, not a zlib one.
        return zlib.decompressobj(31).decompress(packed, 1 << 20).decode("ascii", "replace")
    except zlib.error:
        return ""


def read_poisoning() -> Poisoning:
    """Of the running kernel."""
    return poisoning(read_text("/proc/cmdline"), read_config(os.uname().release))


def read_boot_id() -> bytes:
    """Sixteen bytes that differ for each boot; zeros where the kernel does not say."""
    digits = read_text("/proc/sys/kernel/random/boot_id").strip().replace("-", "")
    return bytes.fromhex(digits) if re.fullmatch("[0-9a-f]{32}", digits) else bytes(16)
