"""How many guests fit: all booted from one image and all serving, in a control group of limited memory, by method."""

from __future__ import annotations


def main() -> None:
    """Try each method."""
    # The host's process is of this package, too, and has no use for pictures.
    from benchmarks.density import experiment

    experiment.main()
