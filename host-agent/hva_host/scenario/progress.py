"""Who plays a scenario tells how it goes through this seam; what a user sees of it is the caller's business."""

from __future__ import annotations

from typing import Protocol

from hva_host.report.model import StepRecord


class Progress(Protocol):
    """Told, in order, what goes on. All text is printable."""

    def say(self, line: str) -> None:
        """A stage outside the steps: building an image, launching, shutting down."""

    def step_begins(self, number: int, total: int, title: str) -> None:
        """Step ``number`` of ``total`` begins."""

    def step_goes_on(self, figures: str) -> None:
        """What the running step has come to so far."""

    def step_ended(self, step: StepRecord, total: int) -> None:
        """A step has ended, or will not be run."""
