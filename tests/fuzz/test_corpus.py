"""What fuzzing has found is replayed by the ordinary tests; and the corpus stays small."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz.targets import TARGETS

CORPUS = Path(__file__).parent / "corpus"


@pytest.mark.parametrize("target", TARGETS)
def test_the_corpus_breaks_nothing(target: str) -> None:
    inputs = sorted((CORPUS / target).iterdir())
    assert len(inputs) > 20
    for path in inputs:
        data = path.read_bytes()
        try:
            TARGETS[target](data)
        except Exception as error:
            raise AssertionError(f"{path.name}: {data!r}") from error


def test_the_corpus_is_small() -> None:
    assert sum(path.stat().st_size for path in CORPUS.rglob("*") if path.is_file()) <= 200 * 1024
