"""Statistics of raw samples: the figures of a record from its rounds, and how sure they are."""

from __future__ import annotations

import dataclasses
import math
import statistics
from typing import Any

from .config import Record, median_error, per_round

# Share of the earlier rounds' rate; what falls below it and stays there is another rate, not noise. Chosen: a planted
# clock left 0.48 (benchmarks/recorded/planted-faults-h200.txt).
DRIFT = 0.8
# Student's t, two-sided 95 %, for 2 to 7 degrees of freedom, as in any table of it
_T = {2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365}


def summarize(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """The record's figures from raw samples: medians over rounds with 95 % intervals."""
    figures: dict[str, Any] = {}
    for name in ("tokens_per_s", "decode_tokens_per_s", "ttft_s"):
        figures[name], low, high = rate_interval(samples, name)
        figures[f"{name}_interval"] = (low, high) if math.isfinite(high) else None
    rates = per_round(samples, "tokens_per_s")
    figures["spread"] = statistics.stdev(rates) / statistics.median(rates) if len(rates) > 1 else 0.0
    figures["drift"] = drift(samples)
    proposed = sum(sample["proposed"] for sample in samples)
    verifications = sum(sample["verifications"] for sample in samples)
    if proposed:
        figures["acceptance"] = sum(sample["accepted"] for sample in samples) / proposed
        figures["mean_depth"] = proposed / sum(len(sample["step_s"]) for sample in samples)
        figures["tokens_per_verification"] = 1 + sum(sample["accepted"] for sample in samples) / verifications
    return figures


def pooled(first: Record, second: Record) -> Record:
    """Two measurements of the same thing as one: the second with the rounds of both, and the higher footprint."""
    after = 1 + max(sample["round"] for sample in first.samples)
    samples = [*first.samples, *({**sample, "round": sample["round"] + after} for sample in second.samples)]
    figures = summarize(samples)
    del figures["drift"]
    peak = max(record.peak_bytes or 0 for record in (first, second)) or None
    return dataclasses.replace(second, **figures, samples=tuple(samples), stage=first.stage, peak_bytes=peak)


def joined(before: Record | None, record: Record) -> Record:
    """What is known of a pair after one more look: both as one where both were sound, else the later."""
    if before is not None and before.outcome == record.outcome == "ok" and before.samples and record.samples:
        return pooled(before, record)
    return record


def drift(samples: list[dict[str, Any]]) -> float:
    """The later rounds' rate over the earlier ones', where it fell at once, by more than either side varies; else 1.

    Of four rounds or more, at least two afterwards, and less than DRIFT: a lowered clock, not a stall or noise.
    """
    rates = per_round(samples, "tokens_per_s")
    ratios = [1.0]
    for at in range(1, len(rates) - 1 if len(rates) > 3 else 0):
        earlier, later = rates[:at], rates[at:]
        varied = max(max(side) - min(side) for side in (earlier, later))
        if min(earlier) - max(later) > varied:
            ratios.append(statistics.median(later) / statistics.median(earlier))
    return min(ratio if ratio < DRIFT else 1.0 for ratio in ratios)


def rate_interval(samples: list[dict[str, Any]], name: str) -> tuple[float, float, float]:
    """Median over rounds and its 95 % interval, by Student's t with the median's efficiency (sqrt(pi / 2))."""
    values = per_round(samples, name)
    middle = statistics.median(values)
    if len(values) < 2:
        return middle, 0.0, math.inf
    half = _T.get(len(values) - 1, 12.706) * median_error(values)
    return middle, max(0.0, middle - half), middle + half
