"""Where the guest agent reads its memory's layout and its kernel's habits."""

from __future__ import annotations

from pathlib import Path

import pytest

from hva_guest.kernel import poisoning
from hva_guest.memory import memory_ranges, normalised, pressure_of, ranges_of_blocks, ranges_of_iomem, ranges_of_zones
from hvaqemu.protocol import RANGES_MAX, UNKNOWN_U32, Fact

IOMEM = """\
00000000-00000fff : Reserved
00001000-0009fbff : System RAM
000a0000-000fffff : PCI Bus 0000:00
00100000-1fffffff : System RAM
  00200000-00b5ffff : Kernel code
20000000-2fffffff : System RAM (boot memory)
100000000-17fffffff : System RAM
"""

ZONEINFO = """\
Node 0, zone      DMA
  per-node stats
      nr_inactive_anon 8
  pages free     3977
        min      5
        spanned  4095
        present  3998
  start_pfn:           1
Node 0, zone   Normal
  pages free     0
        spanned  126976
        present  126976
  start_pfn:           4096
"""


def test_iomem_names_whole_pages_of_ram() -> None:
    assert ranges_of_iomem(IOMEM) == ((1, 0x9E), (0x100, 0x2FF00), (0x100000, 0x80000))


def test_iomem_without_privilege_names_nothing() -> None:
    assert ranges_of_iomem("00000000-00000000 : System RAM\n00000000-00000000 : System RAM\n") == ()


def test_zones() -> None:
    assert ranges_of_zones(ZONEINFO) == ((1, 4095 + 126976),)


def test_memory_blocks(tmp_path: Path) -> None:
    assert ranges_of_blocks(str(tmp_path / "none")) == ()
    (tmp_path / "block_size_bytes").write_text("8000000\n")
    for index, state in ((0, "online"), (1, "online"), (2, "offline"), (3, "online")):
        block = tmp_path / f"memory{index}"
        block.mkdir()
        (block / "phys_index").write_text(f"{index:08x}\n")
        (block / "state").write_text(state + "\n")
    assert ranges_of_blocks(str(tmp_path)) == ((0, 0x10000), (0x18000, 0x8000))


def test_this_machine_has_memory(tmp_path: Path) -> None:
    """The fallbacks find something where iomem does not help."""
    assert memory_ranges(str(tmp_path / "no iomem"))


def test_ranges_are_bounded() -> None:
    assert len(normalised((pfn, pfn + 1) for pfn in range(0, 1000, 2))) == RANGES_MAX
    assert normalised([(5, 5), (9, 12), (1, 3), (2, 10)]) == ((1, 11),)


def test_pressure() -> None:
    text = "some avg10=12.34 avg60=0.00 avg300=0.00 total=0\nfull avg10=1.00\n"
    assert pressure_of(text, "some") == 1234 and pressure_of(text, "full") == 100
    assert pressure_of("", "some") == UNKNOWN_U32


DEBIAN = (
    "CONFIG_PAGE_POISONING=y\nCONFIG_DEBUG_PAGEALLOC=y\nCONFIG_INIT_ON_ALLOC_DEFAULT_ON=y\n# CONFIG_KASAN is not set\n"
)


@pytest.mark.parametrize(
    ("command_line", "config", "expected"),
    [
        ("root=/dev/vda", DEBIAN, (Fact.OFF, Fact.OFF, Fact.ON, Fact.OFF)),
        ("page_poison=1", DEBIAN, (Fact.ON, Fact.OFF, Fact.ON, Fact.OFF)),
        ("page_poison=on page_poison=off init_on_alloc=0", DEBIAN, (Fact.OFF, Fact.OFF, Fact.OFF, Fact.OFF)),
        ("page_poison=perhaps", DEBIAN, (Fact.UNKNOWN, Fact.OFF, Fact.ON, Fact.OFF)),
        ("debug_pagealloc=on init_on_free=1", DEBIAN, (Fact.OFF, Fact.ON, Fact.ON, Fact.ON)),
        ("debug_pagealloc=on", "CONFIG_SMP=y\n", (Fact.OFF, Fact.OFF, Fact.OFF, Fact.OFF)),
        ("quiet", "", (Fact.OFF, Fact.UNKNOWN, Fact.UNKNOWN, Fact.UNKNOWN)),
        ("", DEBIAN, (Fact.UNKNOWN, Fact.UNKNOWN, Fact.UNKNOWN, Fact.UNKNOWN)),
    ],
)
def test_poisoning(command_line: str, config: str, expected: tuple[Fact, ...]) -> None:
    assert poisoning(command_line, config)[:4] == expected


def test_configuration_names() -> None:
    assert poisoning("x", DEBIAN).config == (
        "CONFIG_PAGE_POISONING", "CONFIG_DEBUG_PAGEALLOC", "CONFIG_INIT_ON_ALLOC_DEFAULT_ON",
    )  # fmt: skip
