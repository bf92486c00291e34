"""What the quickstart promises, whoever runs it."""

from __future__ import annotations

import json
from pathlib import Path

from hvaqemu.units import MiB

EXAMPLE = Path(__file__).parents[2] / "examples/quickstart.yaml"


def holds_all_it_promises(result: Path, folder: Path) -> None:
    """Look at what a run of :data:`EXAMPLE` wrote with ``--json`` and ``--report``."""
    report = json.loads(result.read_text())
    assert report["failures"] == []
    assert report["ok"] is True

    saved, measures = report["saved"], report["measures"]
    assert saved["before"] == saved["after"] == saved["finally"]
    assert len(saved["before"].split()[0]) == 32
    filled, reclaimed, reaccessed = measures["filled"], measures["reclaimed"], measures["reaccessed"]
    assert filled["backing_bytes"] >= 350 * MiB
    assert reclaimed["backing_bytes"] <= 0.17 * filled["backing_bytes"]
    # The guest was asked for nothing, and the bytes came back from the layer.
    assert abs(reclaimed["guest_free_bytes"] - filled["guest_free_bytes"]) < 32 * MiB
    assert reclaimed["layer_pages"] > 50_000
    assert reaccessed["refaults"] > reclaimed["refaults"]
    assert reaccessed["backing_bytes"] > 300 * MiB
    assert measures["ballooned"]["guest_free_bytes"] < 64 * MiB
    assert report["stalls"]["count"] > 0
    assert len(report["epochs"]) > 10
    assert all(
        epoch["candidates"] == epoch["discarded"] + epoch["touched"] + epoch["unmatched"] + epoch["unconfirmed"]
        for epoch in report["epochs"]
    )
    assert len(report["timeline"]) > 50
    assert len(report["ram"]) > 10
    assert "<canvas" in (folder / "report.html").read_text()
    assert (folder / "timeline.png").read_bytes().startswith(b"\x89PNG")
