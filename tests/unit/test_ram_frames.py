"""Maps of guest RAM: shares that add up, nothing that is there is lost, and what is no map is told from one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hva_host.agent.ram_frames import CELLS, RESIDENCES, RamFrame, pages_per_cell, shares
from hvaqemu.errors import ProtocolError
from hvaqemu.pages import Residence
from tests.unit.scenario_stand_ins import a_frame


@given(st.integers(1, 3 * CELLS + 7), st.integers(0, 2**32 - 1))
def test_shares_add_up_and_a_single_page_is_not_lost(pages: int, seed: int) -> None:
    kinds = np.random.default_rng(seed).integers(0, 6, pages).astype(np.uint8)
    found = shares(kinds, RESIDENCES)
    size = pages_per_cell(pages)
    assert found.shape == (len(RESIDENCES), -(-pages // size))
    assert found.shape[1] <= CELLS
    for row, kind in enumerate(RESIDENCES):
        for cell in range(found.shape[1]):
            part = kinds[cell * size : (cell + 1) * size]
            count = np.count_nonzero(part == kind)
            assert bool(found[row, cell]) == bool(count)
            assert abs(found[row, cell] / 255 - count / len(part)) <= 1 / 255


def test_one_page_of_a_large_guest_is_seen() -> None:
    kinds = np.zeros(1 << 20, dtype=np.uint8)
    kinds[-1] = Residence.PRESERVED
    found = shares(kinds, RESIDENCES)
    assert found[RESIDENCES.index(Residence.PRESERVED), -1] == 1
    assert found[0, -1] == 254


def test_a_frame_is_the_same_as_json_and_back() -> None:
    frame = a_frame(3.0)
    again = RamFrame.model_validate_json(frame.model_dump_json())
    assert again == frame
    assert (again.residence_shares() == 51).all()
    states = again.state_shares()
    assert states is not None
    assert states.shape == (3, 64)
    assert frame.model_copy(update={"states": ""}).state_shares() is None


@pytest.mark.parametrize("change", [{"residence": "AAAA"}, {"residence": "!"}, {"cells": 65}, {"cells": 1}])
def test_what_is_no_map_is_told(change: dict[str, object]) -> None:
    with pytest.raises(ProtocolError):
        a_frame().model_copy(update=change).residence_shares()
