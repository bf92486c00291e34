"""What fuzzing has found is replayed by the ordinary tests; and the corpus stays small, and packed alike."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz import inputs
from tests.fuzz.targets import TARGETS


@pytest.mark.parametrize("target", TARGETS)
def test_the_corpus_breaks_nothing(target: str) -> None:
    corpus = inputs.read(target)
    assert len(corpus) > 20
    for name, data in corpus.items():
        try:
            TARGETS[target](data)
        except Exception as error:
            raise AssertionError(f"{name}: {data!r}") from error


def test_the_corpus_is_small() -> None:
    assert sum(len(data) for target in TARGETS for data in inputs.read(target).values()) <= 200 * 1024


@pytest.mark.parametrize("target", TARGETS)
def test_packing_the_same_inputs_changes_nothing(target: str, tmp_path: Path) -> None:
    inputs.unpack(target, tmp_path)
    again = tmp_path.with_suffix(".zip")
    inputs.pack(again, [path.read_bytes() for path in tmp_path.iterdir()])
    assert again.read_bytes() == inputs.archive(target).read_bytes()
