"""A guest full of pages that are all alike, or alike to one block: as much work as any other guest, and right."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np

from hva_host.pager.membership import Member
from hvaqemu.pages import Residence
from tests.kernel.harness import Guest, block, crc, make_layer

_PAGES = 8192


def _epoch_seconds(guest: Guest, content: bytes) -> float:
    """Seconds of an epoch over a guest full of ``content``, from which nothing is left."""
    pages = len(content) // 4096
    guest.ram.ledger.erase(0, pages)
    for start in range(0, len(content), 1 << 22):
        guest.fill(start // 4096, content[start : start + (1 << 22)])
    epoch = guest.begin(dict.fromkeys(range(pages), Member.COPY), seconds=60)
    began = time.perf_counter()
    guest.run(epoch)
    spent = time.perf_counter() - began
    assert epoch.counts["discarded_layer"] == pages, epoch.counts
    assert guest.ram.backing.used_bytes() == 0
    return spent


def test_pages_all_equal_to_one_block(tmp_path: Path) -> None:
    """One block proposes itself for every page, once: a fingerprint names one block, however many are alike."""
    blocks = [block(number) for number in range(_PAGES)]
    # Half of the layer is that block too, so the content that collides most is in the index as often as it can be.
    alike = [block(3)] * _PAGES
    with Guest(_PAGES) as guest:
        guest.ram.add_layer(make_layer(tmp_path, blocks + alike))
        layer = next(iter(guest.ram.layers.values()))
        assert len(layer.index.ordered) == _PAGES, "one entry for each content"
        # In turn: what else the host does would not slow down the same one each time.
        seconds = [
            (_epoch_seconds(guest, b"".join(blocks)), _epoch_seconds(guest, block(3) * _PAGES)) for _ in range(5)
        ]
        different, same = map(min, zip(*seconds, strict=True))
        assert same < 3 * different + 0.05
        kinds = np.unique(guest.ram.ledger.entries >> np.uint64(60))
        assert list(kinds) == [Residence.LAYER]
        for pfn in (0, 1, 17, _PAGES // 2, _PAGES - 1):
            assert guest.checksum(pfn) == crc(block(3))
        guest.write(5, "written")
        assert guest.checksum(4) == guest.checksum(6) == crc(block(3))
