"""Machine profiles."""

from __future__ import annotations

import pytest

from hvaqemu.errors import ConfigError
from hvaqemu.pages import PAGE_SIZE
from hvaqemu.qemu.profile import S390X, RamRegion, profile_named
from hvaqemu.units import MiB


def test_known_by_name() -> None:
    assert profile_named("s390x") is S390X
    with pytest.raises(ConfigError, match=r"'vax' is not a machine profile \(known: s390x\)"):
        profile_named("vax")


def test_ram_is_one_region_from_address_0() -> None:
    assert S390X.ram_regions(512 * MiB) == (RamRegion(0, 0, 512 * MiB),)
    assert S390X.page_size == PAGE_SIZE


def test_memory_it_takes() -> None:
    assert S390X.check_memory(128 * MiB) == ""
    assert "too little" in S390X.check_memory(127 * MiB)
    assert "whole number" in S390X.check_memory(512 * MiB + PAGE_SIZE)
