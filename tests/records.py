"""Records of measurements that never happened, for the tests of everything that reads records."""

from __future__ import annotations

import statistics
from typing import Any

from autotune.config import MIB, Configuration, Outcome, Record
from autotune.search.watch import Watch


def synthetic_record(
    configuration: Configuration,
    context: int,
    rates: tuple[float, ...] = (100.0, 101.0, 99.0),
    *,
    outcome: Outcome = "ok",
    ratio: float | None = 1.0,
    peak: int = 500 * MIB,
    ttft_s: float = 0.1,
    **figures: Any,
) -> Record:
    """A record whose rounds ran at `rates` tokens/s end to end: one prompt a round, 100 new tokens after each."""
    steps = [[(100 / rate - ttft_s) / 99] * 99 for rate in rates]
    samples = [
        {"round": number, "prompt": 0, "new_tokens": 100, "ttft_s": ttft_s, "step_s": step, "step_tokens": [1] * 99}
        | {"proposed": 0, "accepted": 0, "verifications": 0}
        for number, step in enumerate(steps)
    ]
    measured: dict[str, Any] = {
        "tokens_per_s": statistics.median(rates),
        "tokens_per_s_interval": (min(rates), max(rates)),
        "decode_tokens_per_s": statistics.median(99 / sum(step) for step in steps),
        "ttft_s": ttft_s,
        "peak_bytes": peak,
        "perplexity_ratio": ratio,
        "witness": "resident set",
        "load_s": 2.0,
        "measure_s": 1.0,
        "samples": samples,
    }
    return Record(configuration, context, outcome, **(measured | figures))


class Notes(Watch):
    """Keeps what a run notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)
