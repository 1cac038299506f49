"""What is shown while a run works, where there is no terminal."""

from __future__ import annotations

from io import StringIO

from rich.console import Console

from autotune.config import Configuration
from autotune.report.progress import Display


def test_the_share_of_the_gain_that_is_open_is_shown_with_each_trial_once_it_is_known() -> None:
    text = StringIO()
    console = Console(file=text, width=200)
    with Display(console, "end-to-end", 60) as display:
        display.trial(Configuration(), 64, "baseline")
        display.gain(0.041)
        display.trial(Configuration(cache="static"), 64, "search")
        console.print(display._table())
    first, second, *table = text.getvalue().splitlines()
    assert "of the gain" not in first
    assert "search at 64" in second
    assert second.endswith("(4% of the gain open)")
    assert any("(4% of the gain open)" in line for line in table)
