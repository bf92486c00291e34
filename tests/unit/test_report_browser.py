"""The page in a real browser, where one is installed: no complaint, maps drawn, in light and in dark."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread
from numpy.typing import NDArray

from hva_host.agent.ram_frames import RamFrame, packed
from hva_host.report.html.page import page
from hva_host.report.html.shown import of_run
from tests.unit.scenario_stand_ins import a_sample
from tests.unit.test_report_html import whole

BROWSER = next(filter(None, map(shutil.which, ("chromium-headless-shell", "chromium", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no headless browser")

SIZE = (1000, 1600)
#: Blink's numbers for what a page asks by prefers-color-scheme; paper and LAYER in that scheme.
SCHEMES = {"dark": (0, (20, 23, 28), (242, 177, 52)), "light": (1, (255, 255, 255), (242, 177, 52))}


def shown(folder: Path, text: str, scheme: int) -> tuple[NDArray[np.int64], list[str]]:
    """What a browser shows of a page, shape ``(height, width, 3)``, and what it says on its console."""
    assert BROWSER is not None
    source, picture = folder / "report.html", folder / "shot.png"
    source.write_text(text)
    command = [
        BROWSER,
        *("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr"),
        *(f"--user-data-dir={folder / 'profile'}", f"--blink-settings=preferredColorScheme={scheme}"),
        *("--virtual-time-budget=5000", f"--window-size={SIZE[0]},{SIZE[1]}", f"--screenshot={picture}"),
        source.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    console = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
    return np.rint(imread(picture)[:, :, :3] * 255).astype(np.int64), console


def full_of_layer() -> str:
    """A page on which nothing but the map has the colour of LAYER."""
    shares = np.zeros((4, 64), dtype=np.uint8)
    shares[2] = 255
    frames = [RamFrame(at_s=at, cells=64, residence=packed(shares)) for at in (0.0, 3.0, 5.5)]
    samples = [a_sample(at / 2).model_copy(update={"layer_pages": 0, "states": {}}) for at in range(12)]
    text = page([of_run(whole(ram=frames, timeline=samples, epochs=[]))])
    text = text.replace(' checked="checked"', "")
    return text.replace('value="residence"', 'value="residence" checked="checked"')


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_page_is_drawn_without_complaint(tmp_path: Path, scheme: str) -> None:
    number, paper, layer = SCHEMES[scheme]
    pixels, console = shown(tmp_path, full_of_layer(), number)
    assert console == []
    assert tuple(pixels[3, 3]) == paper
    drawn = np.count_nonzero((np.abs(pixels - layer) < 8).all(axis=2))
    # The map has nine tenths of the width; its place alone would have none of this colour.
    assert drawn > 0.8 * SIZE[0] * 250


def test_what_a_page_must_not_do_is_stopped(tmp_path: Path) -> None:
    inserted = '<img src="https://example.invalid/x.png"><script>console.log("it ran")</script></main>'
    _, console = shown(tmp_path, full_of_layer().replace("</main>", inserted), 1)
    assert len(console) == 2
    assert all(re.search("Content Security Policy", line) for line in console)
